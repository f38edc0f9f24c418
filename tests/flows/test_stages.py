"""The graph, as DVC has it."""

from pathlib import Path

import pytest

from flows.stages import PipelineError, pipeline, profile

ROOT = Path(__file__).parents[2]


def test_a_students_stages_in_the_order_of_the_real_dvc_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    stages = pipeline("publish@koala-700m")
    assert [stage.name for stage in stages] == [
        "source",
        "download",
        "filter",
        "teacher",
        "encode",
        "student@koala-700m",
        "distill@koala-700m",
        "evaluate@koala-700m",
        "publish@koala-700m",
    ]
    upstream = {stage.name: set(stage.upstream) for stage in stages}
    assert upstream["source"] == set()
    assert upstream["encode"] == {"filter", "teacher"}
    assert upstream["distill@koala-700m"] == {"encode", "teacher", "student@koala-700m"}


def test_only_stages_that_use_the_network_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    retried = {stage.name for stage in pipeline("publish@koala-1b") if stage.retries}
    assert retried == {"source", "download", "teacher", "publish@koala-1b"}


def test_a_stage_carries_what_dvc_yaml_says_of_it(project: Path) -> None:
    knead, heat, evaluate, publish = pipeline("publish@koala-a")
    assert (knead.name, knead.upstream, knead.retries) == ("knead", (), 1)
    assert (heat.name, heat.retries) == ("heat", 0)
    assert evaluate.upstream == ("heat", "knead")
    assert publish.outs == (Path("artifacts/demo/publish/koala-a"),)
    assert profile() == "demo"


def test_only_what_the_target_needs(project: Path) -> None:
    assert [stage.name for stage in pipeline("heat")] == ["heat"]


def test_an_unknown_student_is_told_which_there_are(project: Path) -> None:
    with pytest.raises(
        PipelineError, match=r"no stage 'publish@panda': choose one of publish@koala-a, publish@koala-b$"
    ):
        pipeline("publish@panda")


def test_a_dvc_yaml_that_dvc_refuses_is_one_line(project: Path) -> None:
    (project / "dvc.yaml").write_text("stages: {knead: {outs: [x]}}")
    with pytest.raises(PipelineError, match=r"dvc.yaml' validation failed: `dvc stage list` says more$") as error:
        pipeline("knead")
    assert "\n" not in str(error.value)
