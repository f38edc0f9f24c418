"""Parameters of the stage `recaption`."""

from typing import Self

from pydantic import Field, model_validator

from koala import pretrained
from koala.config import Config
from koala.data.executor import SharedWork


class RecaptionMachine(SharedWork):
    """Settings of recaptioning that change only its speed and memory."""

    batch_size: int = Field(default=8, gt=0)
    """Images that are captioned at once."""
    threads: int = Field(default=4, gt=0)
    """Threads of each process that decode images ahead of the model."""
    processes: int = Field(default=1, gt=0)
    """Processes that share the shards; of several GPUs each takes its own."""


class RecaptionConfig(Config):
    """Which model captions the kept images anew. None by default: the stage then makes nothing, at once."""

    model: str | None = None
    """An image-to-text model of transformers (BLIP, Florence-2, LLaVA, Qwen-VL, ViT-GPT2, ...): a Hub repository, or a folder. Only
    safetensors and transformers' own classes are read."""
    revision: str | None = None
    """The Hub commit of the model, 40 hexadecimal digits. A folder has none."""
    prompt: str = ""
    """What the model is asked, such as `Describe this image in detail.`, or a task's token, such as `<MORE_DETAILED_CAPTION>`; left
    out: models that need no question."""
    max_tokens: int = Field(default=128, gt=0)
    """Tokens of a caption at most."""
    machine: RecaptionMachine = RecaptionMachine()
    """Settings of speed and memory."""

    @model_validator(mode="after")
    def _model_is_named(self) -> Self:
        if self.model is None and self.model_fields_set & {"revision", "prompt", "max_tokens"}:
            raise ValueError("name a model under recaption.model, or leave the section empty")
        if self.model is not None:
            pretrained.check_pinned(self.model, self.revision)
        return self
