"""dvc.yaml against the code, and DVC's own view of it: what it reruns, stores, shows."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# What runs each stage's command; `distill` trains in processes of its own, the demo's sidecar serves images.
ENTRY = {
    "source": ["koala/data/source.py", "koala/demo/table.py"],
    "download": ["koala/data/download.py", "koala/demo/server.py"],
    "filter": ["koala/data/filter.py", "koala/data/rules.py"],
    "teacher": ["koala/teacher/teacher.py", "koala/demo/images.py"],
    "encode": ["koala/data/encode.py"],
    "reference": ["koala/evaluate/reference.py", "koala/demo/prompts.py"],
    "student": ["koala/unet/student.py"],
    "distill": ["koala/distill/distill.py", "koala/distill/train.py"],
    "evaluate": ["koala/evaluate/evaluate.py", "koala/demo/attributes.py", "koala/demo/prompts.py"],
    "publish": ["koala/publish/publish.py", "koala/publish/targets/folder.py"],
}
# Housekeeping decides nothing of what a stage makes: it loads, shows, checks, estimates, distributes or logs. Values of
# configuration types are parameters. Kinds of metric, rule and target are entries of their own above.
HOUSEKEEPING = {
    "koala/config.py",
    "koala/console.py",
    "koala/errors.py",
    "koala/plots.py",
    "koala/process.py",
    "koala/run.py",
    "koala/data/filter_report.py",
    "koala/distill/checkpoint.py",
    "koala/distill/curves.py",
    "koala/distill/job.py",
    "koala/distill/launch.py",
    "koala/distill/launch_settings.py",
    "koala/distill/memory.py",
    "koala/distill/sharding.py",
    "koala/distill/validation.py",
    "koala/evaluate/metrics/base.py",
    "koala/publish/targets/base.py",
    "koala/teacher/check.py",
    "koala/teacher/shape.py",
    "koala/unet/reference.py",
}
# Building the student is a stage of its own: distillation takes its folder, and of its code only how that is read.
OF_OTHER_STAGES = {"distill": {"koala/unet/student.py", "koala/unet/blocks.py", "koala/unet/weights.py"}}


def imports(file: str) -> Iterator[str]:
    """The project's modules that a file imports, anywhere in it, but for types only."""
    tree = ast.parse((ROOT / file).read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("koala"):
            continue
        for name in node.names:
            for path in (f"{node.module}.{name.name}", node.module):
                file = str(path).replace(".", "/") + ".py"
                if (ROOT / file).is_file():
                    yield file
                    break


def reached(stage: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(ENTRY[stage])
    while waiting:
        file = waiting.pop()
        light = file in HOUSEKEEPING or (file.endswith("/config.py") and file not in ENTRY[stage])
        if file not in seen and not light and file not in OF_OTHER_STAGES.get(stage, ()):
            seen.add(file)
            waiting += imports(file)
    return seen


def deps(stage: str) -> list[str]:
    return STAGES[stage].get("do", STAGES[stage])["deps"]


@pytest.mark.parametrize("stage", STAGES)
def test_deps_cover_the_files_that_decide_what_a_stage_makes(stage: str) -> None:
    assert reached(stage) - set(deps(stage)) == set()


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_files_that_are_there_or_artifacts(stage: str) -> None:
    for dep in deps(stage):
        assert dep.startswith("artifacts/${profile}/") or (ROOT / dep).is_file(), dep
        assert dep not in HOUSEKEEPING, dep


def test_no_student_is_named_in_the_graph_or_the_deployments() -> None:
    for file in ("dvc.yaml", "infra/prefect.yaml"):
        text = (ROOT / file).read_text()
        for student in yaml.safe_load((ROOT / "params.yaml").read_text())["students"]:
            assert student not in text, file


def dvc(project: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout of its own, of which nothing was run."""
    for name in ("koala", "infra", "dvc.yaml", "params.yaml", ".dvcignore", ".gitignore"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    (tmp_path / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc" / "config", tmp_path / ".dvc" / "config")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def test_a_third_student_is_one_row(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stages, metrics and plots are there; so is its deployment (tests/flows)."""
    from dvc.repo import Repo

    params = project / "params.yaml"
    row = "  700m-bk-sdm: {unet: *koala-700m, distill: {features: bk-sdm}}\n\nmachines:\n"
    params.write_text(params.read_text().replace("\nmachines:\n", row, 1))
    monkeypatch.chdir(project)
    with Repo() as repo:
        stages = {stage.addressing: stage for stage in repo.index.stages}
        own = {name for name in stages if name.endswith("@700m-bk-sdm")}
        assert own == {f"{stage}@700m-bk-sdm" for stage in ("student", "distill", "evaluate", "publish")}
        outs = {str(out): out for out in stages["evaluate@700m-bk-sdm"].outs}
        folder = "artifacts/demo/evaluation/700m-bk-sdm"
        assert outs[f"{folder}/metrics.json"].metric
        assert outs[f"{folder}/plots"].plot
        assert outs[f"{folder}/curves"].plot
    from koala.params import load

    loaded = load()
    assert loaded.distill("700m-bk-sdm").features == "bk-sdm"
    assert loaded.distill("koala-700m").features == "koala"
    assert loaded.student("700m-bk-sdm").unet == loaded.student("koala-700m").unet


SMALL = """
stages:
  knead:
    cmd: mkdir -p artifacts/dough && cp -r koala/bench/__init__.py artifacts/dough/a.py
    deps: [koala/bench]
    outs: [artifacts/dough]
"""


def test_bytecode_of_another_python_changes_nothing(project: Path) -> None:
    """Even where a dep were a folder: .dvcignore has __pycache__."""
    (project / "dvc.yaml").write_text(SMALL)
    shutil.rmtree(project / "koala/bench/__pycache__", ignore_errors=True)
    dvc(project, "repro")
    cache = project / "koala/bench/__pycache__"
    cache.mkdir()
    (cache / "x.cpython-399.pyc").write_bytes(b"bytecode")
    assert "Running stage" not in dvc(project, "repro")


def test_an_out_is_stored_once_and_read_only_and_its_stage_runs_again(project: Path) -> None:
    config = (project / ".dvc/config").read_text()
    assert 'type = "hardlink,reflink,copy"' in config
    (project / "dvc.yaml").write_text(SMALL)
    dvc(project, "repro")
    out = project / "artifacts/dough/a.py"
    stored = [file for file in (project / ".dvc/cache").rglob("*") if file.is_file()]
    assert any(file.stat().st_ino == out.stat().st_ino for file in stored)
    assert not out.stat().st_mode & 0o222
    (project / "koala/bench/__init__.py").write_text("changed")
    assert "Running stage 'knead'" in dvc(project, "repro")
    assert out.read_text() == "changed"
