"""The gate, the card, and a release that draws what the student drew."""

import json
from pathlib import Path

import numpy as np
import pytest

from koala import pipeline
from koala.config import load
from koala.errors import KoalaError
from koala.publish.gate import shortfalls
from koala.publish.stage import run

METRICS = {
    "teacher": {"unet_parameters": 1000, "attributes/all": 0.95},
    "after": {"unet_parameters": 310, "attributes/all": 0.9},
    "size_of_teacher": 0.31,
    "speed_up": 2.3,
    "share_of_teacher/attributes/all": 0.947,
}


class Recorder:
    def __init__(self) -> None:
        self.tagged: dict[str, str] = {}

    def tags(self, values: dict[str, str]) -> None:
        self.tagged |= values

    def artifact(self, path: Path) -> None:
        assert path.exists()


def test_gate_names_what_is_short() -> None:
    assert shortfalls({"a": 0.9, "b": 0.5}, {"a": 0.9, "b": 0.6}) == ["b is 0.500, below 0.6"]
    assert shortfalls({"a": float("nan")}, {"a": 0.0})  # not a number is not enough
    with pytest.raises(KoalaError, match="'c', which was not measured: choose from a, b"):
        shortfalls({"a": 1, "b": 1}, {"c": 0})


@pytest.fixture
def evaluated(workspace: Path, tiny_teacher: Path) -> Path:
    """A workspace with a distilled pipeline (the tiny teacher stands for it) and its evaluation."""
    import shutil

    params = load()
    trained, folder = params.out("distill", "koala-700m"), params.out("evaluate", "koala-700m")
    shutil.copytree(tiny_teacher, trained)
    provenance = {
        "student": "koala-700m",
        "profile": "smoke",
        "commit": "abc",
        "run_id": "r1",
        "distill": params.distill.model_dump(mode="json"),
    }
    (trained / "provenance.json").write_text(json.dumps(provenance))
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    (folder / "summary.md").write_text("| model |\n| --- |\n| teacher |\n")
    (folder / "grid.png").write_bytes(b"png")
    return workspace


def test_a_release_draws_what_the_student_drew(evaluated: Path) -> None:
    params, recorder = load(), Recorder()
    run(params, recorder, "koala-700m")
    release = params.out("publish", "koala-700m") / "release"
    prompts = [("a large red circle on a white background", 3)]
    pictures = [
        np.asarray(pipeline.draw(pipeline.load(folder), prompts, steps=3, guidance=2.0)[0])
        for folder in (params.out("distill", "koala-700m"), release)
    ]
    assert np.array_equal(*pictures)
    assert {path.suffix for path in release.rglob("*") if path.is_file()} <= {
        ".json",
        ".txt",
        ".md",
        ".png",
        ".safetensors",
    }
    assert recorder.tagged["released"] == "yes"


def test_the_card_is_valid_and_carries_the_figures(evaluated: Path) -> None:
    from huggingface_hub import ModelCard

    params = load()
    run(params, Recorder(), "koala-700m")
    card = ModelCard.load(params.out("publish", "koala-700m") / "release" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "text-to-image"
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["attributes/all"] == 0.9 and found["speed_up"] == 2.3
    assert "31%" in card.text and "MLflow run `r1`" in card.text


def test_a_student_below_the_threshold_is_not_released(evaluated: Path, change_params) -> None:
    change_params(publish={"require": {"attributes/all": 0.99}})
    params, recorder = load(), Recorder()
    with pytest.raises(KoalaError, match=r"koala-700m is not released: attributes/all is 0.900, below 0.99"):
        run(params, recorder, "koala-700m")
    assert not params.out("publish", "koala-700m").exists()
    assert recorder.tagged["released"] == "no"
