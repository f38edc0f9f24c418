"""The champion measured again: the same images from the release alone, by its own pins, beside its own interval."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from PIL import Image

from koala.demo.prompts import ShapesPrompts
from koala.errors import KoalaError
from koala.evaluate.config import EvaluateConfig, SamplingConfig
from koala.evaluate.generation import generate_images
from koala.evaluate.metrics.base import Column, Metric
from koala.evaluate.metrics.psnr import Psnr
from koala.evaluate.prompts import Prompt, seeded_prompts
from koala.evaluate.values import Values
from koala.publish.champion import Champion, standing
from koala.publish.remeasure import fallen
from koala.publish.targets.folder import FolderTarget

NAME = "koala-700m"


class Brightness(Metric):
    columns: ClassVar[Mapping[str, Column]] = {"brightness": Column("brightness", "{:.1f}")}
    kind: Literal["brightness"] = "brightness"
    scale: float = 1

    def measure(
        self, images: Sequence[Image.Image], prompts: Sequence[Prompt], reference: Sequence[Image.Image] | None
    ) -> dict[str, list[float]]:
        return {"brightness": [self.scale * float(np.asarray(image).mean()) for image in images]}


CONFIG = EvaluateConfig(
    prompts=ShapesPrompts(),
    count=4,
    seed=7,
    metrics=(Brightness(), Psnr()),
    sampling=SamplingConfig(steps=2, guidance=3),
)
Release = Callable[..., Champion]


@pytest.fixture(scope="module")
def measured(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    prompts = seeded_prompts(CONFIG.prompts, CONFIG.count, CONFIG.seed)
    images = generate_images(tiny_teacher, prompts, CONFIG, tmp_path_factory.mktemp("images"), "measure")
    return fmean(Brightness().measure(images, prompts, None)["brightness"])


@pytest.fixture
def release(tiny_teacher: Path, tmp_path: Path) -> Release:
    """A release that stands, whose brightness had this interval, with other pins where the test says so."""

    def make(interval: tuple[float, float], **pins: Any) -> Champion:
        folder = Path(shutil.copytree(tiny_teacher, tmp_path / "release"))
        pinned = {"steps": 2, "guidance": 3.0, "count": 4, "seed": 7, "dtype": "float32"}
        pinned |= {"metrics": {"brightness": {"scale": 1.0}, "psnr": {}}, **pins}
        metrics = {"pinned": pinned, "intervals": {"after": {"brightness": interval, "agreement_db": interval}}}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        prompts = seeded_prompts(CONFIG.prompts, pinned["count"], pinned["seed"])
        Values(prompts, {"after": {"brightness": [1.0] * len(prompts)}}).write(folder / "values.parquet")
        (folder / f"{NAME}.safetensors").write_bytes(b"the single file: not read")
        target = FolderTarget(path=tmp_path / "shelf")
        target.send(folder, NAME)
        found = standing([target], NAME)
        assert found
        return found

    return make


def test_the_same_release_measures_the_same_whatever_the_profile_says_now(release: Release, measured: float) -> None:
    champion = release((measured - 1e-3, measured + 1e-3))
    now = CONFIG.model_copy(update={"count": 9, "seed": 0, "sampling": SamplingConfig(steps=5, guidance=7)})
    assert fallen(now, champion, ["brightness"]) == []
    assert fallen(now, champion, []) == []


def test_a_score_below_the_interval_of_the_release_is_told(release: Release, measured: float) -> None:
    champion = release((measured + 1, measured + 3))
    assert fallen(CONFIG, champion, ["brightness"]) == [
        f"koala-700m v1 (target folder): brightness {measured:.3f}, below its interval {measured + 1:.3f} to {measured + 3:.3f}"
    ]


@pytest.mark.parametrize(
    ("change", "scores", "why"),
    [
        (
            {"metrics": (Brightness(scale=2),)},
            ["brightness"],
            r"was measured by another metric brightness: {'scale': 1.0}",
        ),
        ({}, ["agreement_db"], r"agreement_db of koala-700m v1 \(target folder\) cannot be measured alone"),
        ({}, ["charm"], r"charm of koala-700m v1 \(target folder\) cannot be measured alone"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    release: Release, change: dict[str, Any], scores: list[str], why: str
) -> None:
    with pytest.raises(KoalaError, match=why):
        fallen(CONFIG.model_copy(update=change), release((0, 1)), scores)


def test_other_prompts_are_one_line(release: Release) -> None:
    champion = release((0, 1))
    file = champion.shelf.place / "v1/values.parquet"  # type: ignore[attr-defined]
    Values([Prompt("a fox", seed) for seed in range(7, 11)], {"after": {"brightness": [1.0] * 4}}).write(file)
    with pytest.raises(KoalaError, match=r"was measured on other prompts than evaluate\.prompts has"):
        fallen(CONFIG, champion, ["brightness"])
