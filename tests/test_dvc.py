"""dvc.yaml against the code, and DVC's own view of it: what it reruns, stores, shows."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, get_args, get_origin

import pytest
import yaml

from koala import params as parameters

ROOT = Path(__file__).parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# The files in which a stage's work begins. `distill` trains in processes of its own, the demo's sidecar serves images; kinds
# (of source, rule, metric, ...) are reached through params.yaml, and follow from the unions in koala/params.py.
ENTRY = {
    "source": ["koala/data/source.py"],
    "download": ["koala/data/download.py", "koala/data/workers.py", "koala/demo/server.py"],
    "score": ["koala/data/score.py"],
    "filter": ["koala/data/filter.py"],
    "recaption": ["koala/data/recaption.py"],
    "teacher": ["koala/teacher/teacher.py", "koala/demo/images.py"],
    "encode": ["koala/data/encode.py"],
    "reference": ["koala/evaluate/reference.py"],
    "student": ["koala/unet/student.py"],
    "distill": ["koala/distill/distill.py", "koala/distill/train.py"],
    "evaluate": ["koala/evaluate/evaluate.py"],
    "publish": ["koala/publish/publish.py"],
}
UNIONS = {
    "source": ["Source"],
    "score": ["Scorer"],
    "filter": ["Rule"],
    "teacher": ["Teacher"],
    "reference": ["Prompts"],
    "evaluate": ["Prompts", "Metric"],
    "publish": ["Target"],
}
# Housekeeping decides nothing of what a stage makes: it loads, shows, checks, estimates, distributes or logs. (That sharding
# and checkpoints change no bit is tested in tests/distill.) Values of configuration types are parameters; DVC tracks those.
HOUSEKEEPING = {
    "koala/config.py",
    "koala/console.py",
    "koala/disk.py",
    "koala/errors.py",
    "koala/page.py",
    "koala/plots.py",
    "koala/pretrained.py",
    "koala/process.py",
    "koala/run.py",
    "koala/data/ahead.py",
    "koala/data/earlier.py",
    "koala/data/earlier_images.py",
    "koala/data/earlier_latents.py",
    "koala/data/executor.py",
    "koala/data/filter_report.py",
    "koala/data/scores/base.py",
    "koala/distill/remote_checkpoints.py",
    "koala/data/scores/known.py",
    "koala/data/tally.py",
    "koala/data/manifest.py",
    "koala/data/parquet.py",
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
# Single files are read by the stage `teacher`: these stages take folders. It takes of a student's rule only how a U-Net's
# configuration is read; evaluation counts a U-Net as it is built.
OF_OTHER_STAGES = {
    "distill": {"koala/unet/student.py", "koala/unet/blocks.py", "koala/unet/weights.py"},
    "teacher": {"koala/unet/blocks.py"},
    "reference": {"koala/teacher/embedded.py", "koala/teacher/layout.py"},
    "evaluate": {
        "koala/teacher/embedded.py",
        "koala/teacher/layout.py",
        "koala/unet/blocks.py",
        "koala/unet/student.py",
        "koala/unet/weights.py",
    },
}


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


def kinds(stage: str) -> set[str]:
    """The files of the kinds that a stage may be told to use."""
    found: set[str] = set()
    for union in UNIONS.get(stage, ()):
        types = getattr(parameters, union)
        if get_origin(types) is Annotated:
            types = get_args(types)[0]
        for kind in get_args(types) or (types,):
            # A kind that koala/params.py only completes with a union stands where its base does.
            home = next(each for each in kind.__mro__ if each.__module__ != parameters.__name__)
            found.add(home.__module__.replace(".", "/") + ".py")
    return found


def reached(stage: str) -> set[str]:
    seen: set[str] = set()
    entry = {*ENTRY[stage], *kinds(stage)}
    waiting = list(entry)
    while waiting:
        file = waiting.pop()
        light = file in HOUSEKEEPING or (file.endswith("/config.py") and file not in entry)
        if file not in seen and not light and file not in OF_OTHER_STAGES.get(stage, ()):
            seen.add(file)
            waiting += imports(file)
    return seen


def deps(stage: str) -> list[str]:
    return STAGES[stage].get("do", STAGES[stage])["deps"]


@pytest.mark.parametrize("stage", STAGES)
def test_deps_cover_the_files_that_decide_what_a_stage_makes(stage: str) -> None:
    code = {dep for dep in deps(stage) if dep.endswith(".py")}
    assert reached(stage) - code == set(), "missing"
    assert code - reached(stage) == set(), "decides nothing: a change of it would rerun the stage"


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
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db"}
    done = subprocess.run(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout of its own, of which nothing was run."""
    for name in (
        "koala",
        "infra",
        "approvals.yaml",
        "source.lock.yaml",
        "forget.yaml",
        "dvc.yaml",
        "params.yaml",
        ".dvcignore",
        ".gitignore",
    ):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    (tmp_path / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc" / "config", tmp_path / ".dvc" / "config")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def test_releases_are_an_artifact_of_the_profile(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.repo import Repo

    params = project / "params.yaml"
    params.write_text(params.read_text().replace("\nprofile: demo\n", "\nprofile: smoke\n", 1))
    monkeypatch.chdir(project)
    with Repo() as repo:
        (named,) = repo.artifacts.read().values()
        outs = {str(out) for stage in repo.index.stages for out in stage.outs}
    assert named["releases"].path == "artifacts/smoke/release"
    assert any(out.startswith(f"{named['releases'].path}/") for out in outs)


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


@pytest.fixture
def finished(project: Path, forked: None) -> Path:
    """A project in which DVC knows every stage as done; what they made is a word each."""
    for stage in STAGES.values():
        declared = stage.get("do", stage)
        for student in ("koala-700m", "koala-1b"):
            for out in (*declared["outs"], *declared.get("metrics", ()), *declared.get("plots", ())):
                path = out if isinstance(out, str) else next(iter(out))
                file = project / path.replace("${profile}", "demo").replace("${key}", student)
                if not file.suffix:
                    file = file / "made"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("{}")
    dvc(project, "commit", "--force")
    return project


def changed(project: Path, file: str, edit: Callable[[str], str]) -> set[str]:
    """The stages that DVC sees as changed, or with changed inputs, after an edit of a file."""
    text = (project / file).read_text()
    edited = edit(text)
    assert edited != text
    (project / file).write_text(edited)
    status = json.loads(dvc(project, "status", "--json").splitlines()[-1])
    (project / file).write_text(text)
    return set(status)


def test_dvc_tells_what_changed(finished: Path) -> None:
    """Another machine, another interval of logging, other validation prompts, other words elsewhere: nothing reruns."""
    assert json.loads(dvc(finished, "status", "--json").splitlines()[-1]) == {}

    def replace(old: str, new: str) -> Callable[[str], str]:
        return lambda text: text.replace(old, new, 1)

    both = {"koala-700m", "koala-1b"}
    params = "params.yaml"
    assert changed(finished, params, replace("machine: cpu", "machine: 8xgpu-80gb")) == set()
    assert changed(finished, params, replace("micro_batch: 16", "micro_batch: 8\n      log_every: 3")) == set()
    assert changed(finished, "koala/distill/launch.py", replace('"""', '"""Other words. ')) == set()
    assert changed(finished, "koala/console.py", replace('"""', '"""Other words. ')) == set()
    # The first prompt is the example of the release's card: only the card is made anew.
    prompts = changed(finished, params, replace("- a large red circle", "- a huge red circle"))
    assert prompts == {f"publish@{student}" for student in both}
    # And what does decide what is made is seen.
    assert changed(finished, params, replace("learning_rate: 6.0e-4", "learning_rate: 7.0e-4")) == {
        f"distill@{student}" for student in both
    }
    row = changed(finished, params, replace("depth: {DW3: 6/10", "depth: {DW3: 7/10"))
    assert row == {"student@koala-1b", "distill@koala-1b"}
    guidance = changed(finished, params, replace("guidance: 3.0", "guidance: 4.0"))
    assert guidance == {"reference"} | {f"{stage}@{student}" for stage in ("evaluate", "publish") for student in both}
    losses = changed(finished, "koala/distill/losses.py", replace('"""', '"""Other words. '))
    assert losses == {f"distill@{student}" for student in both}


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


def test_a_stage_by_hand_replaces_what_dvc_protects_and_leaves_the_cache_whole(
    project: Path, empty_store: Path, forked: None
) -> None:
    """Read-only files, hard links into the cache: a stage that wrote into one would change what `dvc checkout` gives."""
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("profile: demo", "profile: smoke", 1))
    shutil.copy(empty_store, project / "mlflow.db")
    assert "Running stage 'source'" in dvc(project, "repro", "source")
    table = project / "artifacts/smoke/table"
    made = {file.name: file.read_bytes() for file in table.iterdir()}
    assert all(file.stat().st_nlink == 2 and not file.stat().st_mode & 0o222 for file in table.iterdir())

    params.write_text(params.read_text().replace("rows: 120}", "rows: 60}"))
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db"}
    by_hand = subprocess.run(
        [Path(sys.executable).with_name("koala"), "source"],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert by_hand.returncode == 0, by_hand.stderr
    assert by_hand.stdout == ""  # a stage gives nothing but its artifact
    assert {file.name: file.read_bytes() for file in table.iterdir()} != made
    dvc(project, "checkout", "--force", "artifacts/smoke/table")
    assert {file.name: file.read_bytes() for file in table.iterdir()} == made
