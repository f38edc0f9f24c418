"""Parameters of the stage `teacher`: where the teacher comes from, by kind."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from koala.config import Config
from koala.teacher.shape import SDXL_SHAPE, TeacherShape, clip_parameters, shape_from, shape_of
from koala.teacher.vocabulary import byte_pairs

if TYPE_CHECKING:
    from PIL.Image import Image

SAFETENSORS = ".safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
LATENT_CHANNELS = 4
TOKENS = 16
"""Tokens of a tiny teacher's prompt. The longest caption of the shapes has 13, start and end included."""
TIME_ID_WIDTH = 8
"""Width of a tiny teacher's sinusoidal embedding of each of SDXL's six time ids."""

Revision = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
"""A commit of the Hub, 40 hexadecimal digits: a branch's name would move."""


class TeacherConfig(Config):
    """Where the teacher comes from. Each kind is a class of its own."""

    kind: str
    """Name of the kind in params.yaml."""

    @abstractmethod
    def shape(self) -> TeacherShape:
        """Return the teacher's shape, before the teacher is there."""

    @property
    @abstractmethod
    def origin(self) -> str:
        """What the teacher is called in messages."""


class HubPart(Config):
    """A part of the pipeline from a repository of its own."""

    repository: str
    """owner/name on the Hugging Face Hub."""
    revision: Revision
    """Commit id, 40 hexadecimal digits."""
    files: tuple[str, ...] = ("config.json", WEIGHTS)
    """Paths in the repository: one .safetensors file, whatever its name, and .json files. Without a config.json the part keeps
    the pipeline's own."""

    @field_validator("files")
    @classmethod
    def _only_data(cls, files: tuple[str, ...]) -> tuple[str, ...]:
        weights = [file for file in files if file.endswith(SAFETENSORS)]
        if len(weights) != 1 or not all(file.endswith((SAFETENSORS, ".json")) for file in files):
            raise ValueError("must be one .safetensors file, and .json files")
        return files


def _safetensors(file: Path) -> Path:
    if file.suffix != SAFETENSORS:
        raise ValueError(f"must be a {SAFETENSORS} file, not {file.name!r}: convert it first")
    return file


class LoraPart(Config):
    """A LoRA that is fused into the teacher."""

    file: Path
    """Path of its .safetensors file, with diffusers' names or kohya's."""
    weight: float = 1.0
    """Factor of its change to the weights."""

    _is_safetensors = field_validator("file")(_safetensors)


class PretrainedTeacher(TeacherConfig):
    """A teacher that exists: what may be changed in it."""

    unet: HubPart | None = None
    """U-Net in place of the pipeline's own. Few-step teachers come as a U-Net alone."""
    vae: HubPart | None = None
    """VAE in place of the pipeline's own. SDXL's gives NaN in float16."""
    scheduler: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Values that replace those of the scheduler's configuration."""
    loras: tuple[LoraPart, ...] = ()
    """LoRAs, fused in this order into the U-Net and, where they have keys for them, the text encoders."""

    def parts(self) -> dict[str, HubPart]:
        """Return the parts that replace the pipeline's own, by name."""
        return {name: part for name, part in (("unet", self.unet), ("vae", self.vae)) if part}

    def shape(self) -> TeacherShape:
        """Return SDXL's shape."""
        return SDXL_SHAPE


class HubTeacher(PretrainedTeacher):
    """A pipeline on the Hugging Face Hub."""

    kind: Literal["hub"] = "hub"
    repository: str
    """owner/name on the Hugging Face Hub."""
    revision: Revision
    """Commit id, 40 hexadecimal digits."""

    @property
    def origin(self) -> str:
        """The repository."""
        return self.repository


class FolderTeacher(PretrainedTeacher):
    """A pipeline in a folder, as diffusers' `save_pretrained` writes it."""

    kind: Literal["folder"] = "folder"
    path: Path
    """Folder with model_index.json."""

    @property
    def origin(self) -> str:
        """The folder."""
        return str(self.path)

    def shape(self) -> TeacherShape:
        """Return the folder's shape. Raises KoalaError if the folder is not a pipeline."""
        return shape_of(self.path)


class FileTeacher(PretrainedTeacher):
    """A pipeline in a single .safetensors file with the keys of SDXL's original layout."""

    kind: Literal["file"] = "file"
    path: Path
    """The .safetensors file."""
    config: Path | None = None
    """Pipeline folder whose configurations and tokenizers the file has; weights in it are not read. None: those that the file
    itself holds, if koala wrote it, or else SDXL's, which are fetched from the Hub."""

    _is_safetensors = field_validator("path")(_safetensors)

    @property
    def origin(self) -> str:
        """The file."""
        return str(self.path)

    def shape(self) -> TeacherShape:
        """Return the shape that `config` gives, or the file itself, or SDXL's.

        Raises KoalaError if `config` is not a pipeline.
        """
        if self.config:
            return shape_of(self.config)
        from koala.teacher.embedded import embedded, is_embedded

        if not is_embedded(self.path):
            return SDXL_SHAPE
        found = embedded(self.path)
        return shape_from(lambda part: found[f"{part}/config.json"])


class ImageSet(Config):
    """Captioned images on which a tiny teacher is trained. Each kind is a class of its own."""

    kind: str
    """Name of the kind in params.yaml."""

    @abstractmethod
    def captions(self) -> Sequence[str]:
        """Return the caption of each image."""

    @abstractmethod
    def images(self, side: int) -> "Sequence[Image]":
        """Return the RGB images, `side` x `side` pixels, in the order of their captions."""

    @abstractmethod
    def sentences(self) -> Iterable[str]:
        """Yield sentences with every word that the tokenizer must know."""


class FitConfig(Config):
    """How a part of the tiny teacher is trained."""

    steps: int = Field(gt=0)
    """Optimizer steps."""
    batch_size: int = Field(gt=0)
    """Images a step."""
    learning_rate: float = Field(gt=0)
    """Peak of AdamW's learning rate: a warm-up over a twentieth of the steps, then a cosine to zero."""


class TinyTeacher(TeacherConfig):
    """A teacher of SDXL's own classes, small enough to be trained on a CPU."""

    kind: Literal["tiny"] = "tiny"
    images: SerializeAsAny[ImageSet]
    """Captioned images that it is trained on."""
    image_size: int = Field(default=32, gt=0)
    """Side of an image, in pixels."""
    vae_channels: tuple[Annotated[int, Field(gt=0, multiple_of=8)], ...] = Field(default=(16, 32, 32), min_length=1)
    """Channels of each level of the VAE, which halves the side between levels. Its normalisation has 8 groups."""
    vae: FitConfig
    """Training of the VAE."""
    unet_channels: tuple[Annotated[int, Field(gt=0, multiple_of=16)], ...] = Field(default=(64, 64, 96), min_length=1)
    """Channels of each level of the U-Net. Its normalisation has 16 groups."""
    unet_depths: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2)
    """Transformer layers at each level, 0 for none. SDXL has 0, 2, 10."""
    text_width: int = 64
    """Width of each of the two text encoders."""
    unet: FitConfig
    """Training of the U-Net together with the text encoders."""
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of samples that are trained without their caption."""
    ema_decay: float = Field(default=0.995, ge=0, lt=1)
    """Decay a step of the EMA of U-Net and text encoders, which becomes the teacher."""
    seed: int = 0
    """Seed of initial weights, order, noise and dropout."""

    @model_validator(mode="after")
    def _levels(self) -> Self:
        if len(self.unet_channels) != len(self.unet_depths):
            raise ValueError(
                f"unet_channels has {len(self.unet_channels)} levels, unet_depths {len(self.unet_depths)}: "
                "give both a number for each level"
            )
        return self

    @property
    def origin(self) -> str:
        """The tiny teacher."""
        return "the tiny teacher"

    def unet_config(self) -> dict[str, Any]:
        """Return the U-Net's UNet2DConditionModel configuration."""
        levels = self.unet_depths
        return {
            "sample_size": self.image_size // self._latent_factor,
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

    def text_config(self) -> dict[str, int]:
        """Return the sizes of each text encoder, as CLIPTextConfig has them."""
        vocabulary, _ = byte_pairs(self.images.sentences())
        return {
            "vocab_size": len(vocabulary),
            "hidden_size": self.text_width,
            "intermediate_size": 2 * self.text_width,
            "projection_dim": self.text_width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": TOKENS,
        }

    def shape(self) -> TeacherShape:
        """Return the shape that the teacher will have."""
        text = self.text_config()
        return TeacherShape(
            unet=self.unet_config(),
            latent_factor=self._latent_factor,
            tokens=TOKENS,
            text_parameters=clip_parameters(text) + clip_parameters(text, projection=True),
        )

    @property
    def _latent_factor(self) -> int:
        factor: int = 2 ** (len(self.vae_channels) - 1)
        return factor
