"""What the evaluation's tests share: a student before and after distillation, and a configuration of a few images."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from koala.demo.prompts import ShapesPrompts
from koala.evaluate.config import EvaluateConfig, EvaluateMachine, SamplingConfig
from koala.evaluate.metrics.base import Column, Metric
from koala.evaluate.metrics.psnr import Psnr
from koala.evaluate.prompts import Prompt
from koala.evaluate.reference import reference
from koala.run import NoRun


class Projection(Metric):
    """A metric of the tests' own: the images' pixels along a fixed random direction, which tells any two models apart."""

    columns: ClassVar[Mapping[str, Column]] = {"projection": Column("projection", "{:.1f}", of_teacher=True)}
    kind: Literal["projection"] = "projection"

    def measure(
        self, images: Sequence[Image.Image], prompts: Sequence[Prompt], reference: Sequence[Image.Image] | None
    ) -> dict[str, list[float]]:
        return {"projection": [self.of(image) for image in images]}

    @staticmethod
    def of(image: Image.Image) -> float:
        pixels = np.asarray(image, float)
        direction = np.random.default_rng(0).standard_normal(pixels.shape)
        return float((pixels * direction).sum() / direction.size**0.5)


@pytest.fixture
def projection() -> Callable[[Image.Image], float]:
    """Return an image's value by the metric `projection`."""
    return Projection.of


@pytest.fixture(scope="session")
def make_config() -> Callable[..., EvaluateConfig]:
    """Build a configuration of 4 images, 2 steps each; keywords replace its fields."""

    def make(**fields: Any) -> EvaluateConfig:
        values = {
            "prompts": ShapesPrompts(),
            "count": 4,
            "seed": 7,
            "metrics": (Projection(), Psnr()),
            "sampling": SamplingConfig(steps=2, guidance=1.0),
            "machine": EvaluateMachine(batch_size=2, latency_repeats=1),
            "grid_rows": 3,
        }
        return EvaluateConfig(**(values | fields))

    return make


@pytest.fixture(scope="session")
def students(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> tuple[Path, Path]:
    """Pipeline folders of a student before distillation, and after: other weights, and training curves."""
    from diffusers import StableDiffusionXLPipeline

    from koala.unet.blocks import StudentRule
    from koala.unet.student import build_student

    rule = StudentRule(down_pairs=(0,), up_pairs=(0, 2), mid="drop", depth={"DW3": "5/10", "UP1": "5/10"})
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_teacher, use_safetensors=True)
    pipeline.unet = build_student(pipeline.unet, rule)
    root = tmp_path_factory.mktemp("students")
    before, after = root / "student" / "koala-700m", root / "distilled" / "koala-700m"
    pipeline.save_pretrained(before, safe_serialization=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    pipeline.save_pretrained(after, safe_serialization=True)
    (after / "curves.csv").write_text("step,loss/total\n1,0.5\n")
    Image.new("RGB", (8, 8)).save(after / "curves.png")
    return before, after


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, make_config: Callable[..., EvaluateConfig]
) -> Path:
    """The teacher's images by `make_config()`; tests read them only."""
    folder = tmp_path_factory.mktemp("images") / "reference"
    reference(make_config(), tiny_teacher, folder, NoRun())
    return folder
