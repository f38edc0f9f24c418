"""Parameters of sampling and of evaluation."""

from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import Field, SerializeAsAny, model_validator

from koala.config import Config
from koala.evaluate.metrics.base import Column, Metric
from koala.evaluate.prompts import PromptSet

COSTS = (
    "unet_parameters",
    "unet_flops",
    "disk_bytes",
    "step_ms",
    "image_ms",
    "peak_bytes",
    "size_of_teacher",
    "speed_up",
    "image_speed_up",
)
"""What is measured of the models themselves (koala/evaluate/cost.py). It has no interval. `peak_bytes` is there on a GPU only."""

SHARE, DIFFERENCE = "share_of_teacher", "difference_from_teacher"
"""Before a score's name: the student's mean over its teacher's, and less its teacher's."""


class SamplingConfig(Config):
    """How images are generated: stated once a profile, used by validation, evaluation and the card's example."""

    steps: int = Field(default=25, gt=0)
    """Sampling steps."""

    guidance: float = Field(default=7.5, ge=0)
    """Scale of classifier-free guidance; up to 1 there is none."""

    prompts: tuple[str, ...] = ()
    """Prompts that validation generates during training. The card's example is the first."""


class EvaluateMachine(Config):
    """Settings of evaluation that change speed and memory, but not what is measured."""

    batch_size: int = Field(default=8, gt=0)
    """Images generated at once, by each process."""

    processes: int = Field(default=1, gt=0)
    """Processes that share a model's images; of several GPUs each takes its own."""

    latency_repeats: int = Field(default=10, gt=0)
    """Timed U-Net steps of the student, and of the teacher before and after it; medians are reported."""


class EvaluateConfig(Config):
    """What is measured, and on which images. The stages `reference` and `evaluate` share it."""

    prompts: SerializeAsAny[PromptSet]
    """Prompts that images are generated from, such as `{kind: file, path: infra/prompts.jsonl}`."""

    count: int = Field(gt=0)
    """Images of each model. The prompts are cycled; image i has the seed `seed + i`."""

    seed: int = 0
    """Seed of the first image."""

    metrics: tuple[SerializeAsAny[Metric], ...] = ()
    """Metrics of image quality."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type in which images are generated and U-Nets are timed."""

    latency_batch: int = Field(default=1, gt=0)
    """Latents in a timed U-Net step."""

    grid_rows: int = Field(default=8, gt=0)
    """Prompts in the grid of images."""

    sampling: SamplingConfig = SamplingConfig()
    """Steps and guidance of the images."""

    machine: EvaluateMachine = EvaluateMachine()
    """Settings of speed and memory."""

    @model_validator(mode="after")
    def _metrics_fit_prompts(self) -> Self:
        for metric in self.metrics:
            metric.check(self.prompts)
        return self

    def scores(self) -> tuple[str, ...]:
        """Return the names of all scores of a student that have an interval."""
        without = {name for name, column in self.columns().items() if not column.interval}
        return tuple(name for metric in self.metrics for name in metric.names() if name not in without)

    def columns(self) -> dict[str, Column]:
        """Return the columns of all metrics by the name of their score."""
        return {
            name: replace(column, label=column.label.format(model=metric.model_name, count=self.count))
            for metric in self.metrics
            for name, column in metric.columns.items()
        }

    def resume_key(self) -> dict[str, Any]:
        """Return what decides the images: they are kept when a metric is added or the report changes."""
        return self.model_dump(
            mode="json",
            include={
                "prompts": True,
                "count": True,
                "seed": True,
                "dtype": True,
                "sampling": {"steps", "guidance"},
            },
        )
