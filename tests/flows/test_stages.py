"""The graph, as DVC has it."""

from pathlib import Path

import pytest

from flows.stages import PipelineError, machine, pipeline, profile, students

ROOT = Path(__file__).parents[2]


def test_a_students_stages_in_the_order_of_the_real_dvc_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    stages = pipeline("publish@koala-700m")
    assert [stage.name for stage in stages] == [
        "source",
        "download",
        "score",
        "filter",
        "recaption",
        "teacher",
        "encode",
        "reference",
        "student@koala-700m",
        "distill@koala-700m",
        "evaluate@koala-700m",
        "publish@koala-700m",
    ]
    upstream = {stage.name: set(stage.upstream) for stage in stages}
    assert upstream["source"] == set()
    assert upstream["filter"] == {"download", "score"}
    assert upstream["encode"] == {"filter", "teacher"}
    assert upstream["reference"] == {"teacher"}
    assert upstream["distill@koala-700m"] == {"encode", "recaption", "teacher", "student@koala-700m"}
    assert upstream["evaluate@koala-700m"] == {"teacher", "student@koala-700m", "distill@koala-700m", "reference"}
    assert upstream["publish@koala-700m"] == {"distill@koala-700m", "evaluate@koala-700m"}


def test_the_real_stages_make_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    folders = {stage.name: stage.folder for stage in pipeline("publish@koala-1b")}
    assert folders["evaluate@koala-1b"] == Path("artifacts", profile(), "evaluation/koala-1b")
    assert folders["publish@koala-1b"] == Path("artifacts", profile(), "release/koala-1b")


def test_only_stages_that_use_the_network_are_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    retried = {stage.name for stage in pipeline("publish@koala-1b") if stage.retries}
    assert retried == {"source", "download", "score", "recaption", "teacher", "publish@koala-1b"}


def test_a_stage_carries_what_dvc_yaml_says_of_it(project: Path) -> None:
    knead, heat, evaluate, publish = pipeline("publish@koala-a")
    assert (knead.name, knead.upstream, knead.retries) == ("knead", (), 1)
    assert (heat.name, heat.retries) == ("heat", 0)
    assert evaluate.upstream == ("heat", "knead")
    assert len(evaluate.outs) == 5
    assert evaluate.folder == Path("artifacts/demo/evaluation/koala-a")
    assert publish.outs == (Path("artifacts/demo/release/koala-a"),)
    assert publish.folder == publish.outs[0]


def test_profile_and_machine_of_params_yaml(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KOALA_MACHINE", raising=False)
    assert (profile(), machine()) == ("demo", "toaster")
    monkeypatch.setenv("KOALA_MACHINE", "oven")
    assert machine() == "oven"


def test_a_row_in_params_yaml_is_a_student(project: Path) -> None:
    assert students() == ["koala-a", "koala-b"]
    (project / "params.yaml").write_text("profile: demo\nstudents: {koala-b: {x: 2}, koala-c: {x: 3}}\n")
    assert students() == ["koala-b", "koala-c"]


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
