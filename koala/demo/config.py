"""Parameters of the tiny teacher that the demo trains."""

from typing import Any, Literal

from pydantic import Field

from koala.section import Section

LATENT_CHANNELS = 4
TOKENS = 16  # the longest caption of koala.demo.shapes has 13 with its two marks
TIME_ID_WIDTH = 8  # of the sinusoidal embedding of each of SDXL's six time ids


class FitConfig(Section):
    """How long and how fast a part of the tiny teacher is trained."""

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0)


class TinyTeacherConfig(Section):
    """A teacher of SDXL's own classes, small enough to train on a CPU, for pictures of koala.demo.shapes.

    The VAE halves the side between its channels; the U-Net has a level for each of its channels and the depths of the
    transformers there (0: none), as SDXL has 0, 2, 10.
    """

    kind: Literal["tiny"]
    image_size: int = Field(default=32, gt=0)
    pictures: int = Field(default=8000, gt=0)
    vae_channels: tuple[int, ...] = (16, 32, 32)
    vae: FitConfig
    unet_channels: tuple[int, ...] = (64, 64, 96)
    unet_depths: tuple[int, ...] = (0, 1, 2)
    text_width: int = 64
    unet: FitConfig
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    ema_decay: float = Field(default=0.995, ge=0, lt=1)
    seed: int = 0

    def unet_config(self) -> dict[str, Any]:
        """The U-Net's UNet2DConditionModel configuration."""
        levels = self.unet_depths
        return {
            "sample_size": self.image_size // 2 ** (len(self.vae_channels) - 1),
            "in_channels": LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "block_out_channels": self.unet_channels,
            "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in levels),
            "up_block_types": tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(levels)),
            "transformer_layers_per_block": [max(depth, 1) for depth in levels],
            "attention_head_dim": [max(width // 32, 1) for width in self.unet_channels],
            "layers_per_block": 2,
            "cross_attention_dim": 2 * self.text_width,
            "norm_num_groups": 16,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME_ID_WIDTH,
            "projection_class_embeddings_input_dim": 6 * TIME_ID_WIDTH + self.text_width,
        }
