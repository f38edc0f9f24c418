"""Configurations: what is refused when they are read, and what decides the images."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from koala.demo.attributes import Attributes
from koala.demo.prompts import ShapesPrompts
from koala.evaluate.config import EvaluateMachine, SamplingConfig
from koala.evaluate.metrics.clip_score import ClipScore
from koala.evaluate.metrics.cmmd import Cmmd
from koala.evaluate.metrics.fd_dinov2 import FdDinov2
from koala.evaluate.metrics.hps_v21 import HpsV21
from koala.evaluate.metrics.psnr import Psnr
from koala.evaluate.prompt_files import FilePrompts


def test_attributes_need_the_demos_prompts(make_config) -> None:
    with pytest.raises(ValidationError, match=r"metric 'attributes' needs 'prompts: .kind: shapes.'"):
        make_config(prompts=FilePrompts(path=Path("prompts.txt")), metrics=(Attributes(),))
    assert make_config(metrics=(Attributes(),)).metrics == (Attributes(),)


def test_options_of_metrics_and_prompts_are_part_of_the_recipe(make_config) -> None:
    recipe = make_config(prompts=FilePrompts(path=Path("some.txt"))).recipe()
    assert recipe["prompts"] == {"kind": "file", "path": "some.txt"}
    assert [metric["kind"] for metric in recipe["metrics"]] == ["projection", "psnr"]
    assert recipe["sampling"]["steps"] == 2
    assert "machine" not in recipe


def test_resume_key_holds_what_decides_the_images(make_config) -> None:
    key = make_config().resume_key()
    same = {
        "metrics": (Psnr(),),
        "grid_rows": 1,
        "machine": EvaluateMachine(batch_size=5),
        "sampling": SamplingConfig(steps=2, guidance=1.0, prompts=("a fox",)),
    }
    for field, value in same.items():
        assert make_config(**{field: value}).resume_key() == key, field
    other = {
        "prompts": FilePrompts(path=Path("prompts.txt")),
        "count": 6,
        "seed": 8,
        "dtype": "bfloat16",
        "sampling": SamplingConfig(steps=3, guidance=1.0),
    }
    for field, value in other.items():
        assert make_config(**{field: value}).resume_key() != key, field
    assert make_config(prompts=ShapesPrompts()).resume_key() == key


def test_no_rule_can_name_a_figure_without_an_interval(make_config) -> None:
    cmmd, fd = Cmmd(model="m"), FdDinov2(model="m")
    config = make_config(metrics=(cmmd, fd, Psnr()))
    assert config.scores() == ("cmmd", "agreement_db")
    assert "fd_dinov2" in config.columns()


def test_a_column_names_the_model_and_the_count(make_config) -> None:
    metrics = (ClipScore(model="openai/clip-vit", revision="a" * 40), FdDinov2(model="../models/dino"), Psnr())
    labels = {name: column.label for name, column in make_config(metrics=metrics, count=7).columns().items()}
    assert labels == {
        "clip_score": "CLIP score (clip-vit)",
        "fd_dinov2": "FD to teacher (dino, 7 images)",
        "agreement_db": "PSNR to teacher",
    }


@pytest.mark.parametrize(
    ("kind", "options", "asked"),
    [
        (ClipScore, {"model": "owner/clip"}, "HEAD"),
        (ClipScore, {"model": "owner/clip", "revision": "refs/pr/7"}, "refs/pr/7"),
        (HpsV21, {"model": "/hps", "base": "owner/clip", "base_revision": "main"}, "main"),
    ],
)
def test_a_model_of_the_hub_is_pinned(kind, options, asked, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = (
        rf"owner/clip is no folder here, and its revision .* must be a commit.*`git ls-remote \S+/owner/clip {asked}`"
    )
    with pytest.raises(ValidationError, match=line):
        kind(**options)
    (tmp_path / "owner" / "clip").mkdir(parents=True)  # a folder of that name needs none
    kind(**options)
