"""Parameters of the tiny teacher that the demo trains."""

from typing import Literal

from pydantic import Field

from koala.section import Section


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
