"""Parameters of evaluation."""

from typing import Literal

from pydantic import Field, model_validator

from koala.section import Section


class EvaluateConfig(Section):
    """What is measured, and how pictures are made for it.

    metrics: `attributes` reads shapes back from the pictures (only with prompts of koala.demo.shapes); `clip` is the
    cosine of CLIP's image and text embeddings, by the model `clip_model` at `clip_revision`.
    prompts: `shapes` for all of the demo's attributes in turn, or a text file with a prompt a line.
    """

    prompts: str
    count: int = Field(gt=0, description="pictures: prompts are taken in turn, picture i with seed + i")
    metrics: tuple[Literal["attributes", "clip"], ...]
    clip_model: str | None = None
    clip_revision: str | None = None
    steps: int = Field(gt=0, description="sampling steps")
    guidance: float = Field(ge=0)
    batch_size: int = Field(default=8, gt=0)
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    grid_rows: int = Field(default=8, gt=0)
    latency_batch: int = Field(default=1, gt=0)
    latency_repeats: int = Field(default=10, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _complete(self) -> "EvaluateConfig":
        if "clip" in self.metrics and not (self.clip_model and self.clip_revision):
            raise ValueError("metric 'clip' needs 'clip_model' and a pinned 'clip_revision'")
        if "attributes" in self.metrics and self.prompts != "shapes":
            raise ValueError("metric 'attributes' needs 'prompts: shapes'")
        return self
