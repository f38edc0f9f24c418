"""One stage from parameters to artifact: what it refuses, what it keeps, what it moves."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo

from koala import provenance, runner
from koala.config import Config
from koala.data import forget
from koala.errors import KoalaError
from koala.run import EARLIER, STATE

ROOT = Path(__file__).parents[1]
TABLE = Path("artifacts/smoke/table")


def writes(text: str) -> Callable[..., None]:
    """A stage that writes a file."""

    def stage(config: Config, out: Path, run: object, **_: Path) -> None:
        (out / "made").write_text(text)

    return stage


def interrupted(config: Config, out: Path, run: object, **_: Path) -> None:
    (out / "half").write_text("finished work")
    (out / STATE).mkdir()
    (out / STATE / "position").write_text("7")
    raise KeyboardInterrupt


def make(stage: str, text: str = "x", student: str | None = None) -> Path:
    """Run a stage that writes a file; gives its artifact."""
    job = runner.prepare(stage, student)
    job.run(writes(text))
    return job.artifact


def test_a_missing_input_is_one_line_before_torch_is_imported(workspace: Path) -> None:
    code = "import sys; from koala import cli; cli.QUIET; sys.argv = ['koala', {!r}, *{!r}]; cli.main()"
    check = "import atexit; atexit.register(lambda: print('torch' in sys.modules));"
    for stage, student, line in (
        ("download", [], "artifacts/smoke/table is missing: run `dvc repro source` (or `koala source`) first"),
        (
            "distill",
            ["koala-1b"],
            "artifacts/smoke/latents is missing: run `dvc repro encode` (or `koala encode`) first",
        ),
    ):
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; {check} " + code.format(stage, student)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert done.stderr.strip() == f"koala: {line}"
        assert done.stdout.strip() == "False"


def test_a_machines_threads_reach_openmp_unless_the_user_says_otherwise(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    runner.prepare("source")
    assert os.environ["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    runner.prepare("source")
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_a_students_missing_input_names_the_students_command(workspace: Path) -> None:
    for noun in ("latents", "captions", "teacher"):
        Path("artifacts/smoke", noun).mkdir(parents=True)
    with pytest.raises(KoalaError, match=r"run `dvc repro student@koala-1b` \(or `koala student koala-1b`\) first"):
        runner.prepare("distill", "koala-1b")


def test_a_gate_with_too_few_prompts_says_so_before_images_are_generated(
    workspace: Path, change_params, capsys
) -> None:
    rule = {"metric": "attributes/all", "of": "teacher", "at_least": 0.98}
    change_params(publish={"require": [rule]})
    make("teacher")
    assert "too few" not in capsys.readouterr().err
    runner.prepare("reference")
    said = [line for line in capsys.readouterr().err.splitlines() if "too few" in line]
    assert len(said) == 1
    assert said[0].startswith("publish.require: attributes/all of teacher at least 0.98: 6 prompts are too few")


def test_the_artifact_carries_its_provenance(workspace: Path) -> None:
    table = make("source")
    images = make("download")
    found = provenance.read(images)
    assert (found["stage"], found["profile"], found["student"]) == ("download", "smoke", None)
    assert found["inputs"] == {"table": provenance.content_hash(table, runner.HASHES)}
    assert found["content"] == provenance.content_hash(images, runner.HASHES)
    assert found["config"]["image_size"] == 32
    assert "machine" not in found["config"]
    from mlflow import MlflowClient

    run = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_run(found["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["data_hash.table"] == found["inputs"]["table"]
    assert run.data.tags["data_hash"] == found["content"]
    assert run.data.params["download.image_size"] == "32"


def test_an_interrupted_stage_finds_what_it_left_and_its_run(workspace: Path) -> None:
    job = runner.prepare("source")
    with pytest.raises(KeyboardInterrupt):
        job.run(interrupted)
    assert not job.artifact.exists()

    def resumed(config: Config, out: Path, run: object) -> None:
        assert (out / "half").read_text() == "finished work"
        assert (out / STATE / "position").read_text() == "7"
        shutil.rmtree(out / STATE)

    runner.prepare("source").run(resumed)
    assert {path.name for path in TABLE.iterdir()} == {"half", "provenance.json"}
    assert [path.name for path in Path("runs/source").iterdir()] == ["provenance.json"]
    from mlflow import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (run,) = client.search_runs([client.get_experiment_by_name("koala-smoke").experiment_id])
    assert run.info.status == "FINISHED"


def test_state_stays_behind_and_comes_back_also_after_a_kill_between_the_moves(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keeps_state(config: Config, out: Path, run: object) -> None:
        (out / STATE).mkdir(exist_ok=True)
        with (out / STATE / "calls").open("a") as calls:
            calls.write("x")

    runner.prepare("source").run(keeps_state)
    assert not (TABLE / STATE).exists()
    with monkeypatch.context() as patch:
        patch.setattr(runner, "move", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            runner.prepare("source").run(keeps_state)
    job = runner.prepare("source")
    job.run(keeps_state)
    assert (job.work(job.hashes()) / "out" / STATE / "calls").read_text() == "xxx"
    assert not (TABLE / STATE).exists()


def test_a_kill_at_any_point_of_the_move_loses_nothing(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run finds all that was made, or it is in place."""
    make("source", "the artifact before")
    replace, remove = os.replace, shutil.rmtree
    points = 0

    def dies_at(point: int) -> bool:
        """Run the stage, and kill it before that step of the move; whether there was such a step."""
        steps = iter(range(100))

        def counted(function: Callable[..., None]) -> Callable[..., None]:
            def step(*arguments: object, **options: object) -> None:
                if next(steps) == point:
                    raise KeyboardInterrupt
                function(*arguments, **options)

            return step

        def move(folder: Path, to: Path) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", counted(replace))
                patch.setattr(shutil, "rmtree", counted(remove))
                real(folder, to)

        with monkeypatch.context() as patch:
            real = runner.move
            patch.setattr(runner, "move", move)
            try:
                make("source", f"made before step {point}")
            except KeyboardInterrupt:
                return True
        return False

    found = []

    def looks(config: Config, out: Path, run: object) -> None:
        found.append((out / "made").read_text() if (out / "made").exists() else None)
        (out / "made").write_text("again")

    while dies_at(points):
        in_place = (TABLE / "made").read_text() if TABLE.exists() else None
        runner.prepare("source").run(looks)
        assert f"made before step {points}" in (in_place, found[-1])
        assert (TABLE / "made").read_text() == "again"
        assert [path.name for path in TABLE.parent.iterdir()] == ["table"]
        points += 1
    assert points >= 5


def test_an_artifact_replaces_the_one_before_and_does_not_mix_with_it(workspace: Path) -> None:
    teacher = Path("artifacts/smoke/teacher")
    teacher.mkdir(parents=True)
    (teacher / "by-hand").write_text("another teacher's")
    assert make("teacher") == teacher
    assert {path.name for path in teacher.iterdir()} == {"made", "provenance.json"}


def test_what_is_made_by_hand_is_what_the_next_stage_keys_by_though_the_lock_says_otherwise(workspace: Path) -> None:
    make("source", "first")
    old = runner.prepare("download").hashes()
    lock = {"stages": {"source": {"outs": [{"path": str(TABLE), "md5": "of the first"}]}}}
    Path("dvc.lock").write_text(yaml.safe_dump(lock))
    make("source", "other")
    assert runner.prepare("download").hashes() != old
    make("source", "first")
    assert runner.prepare("download").hashes() == old


def test_the_same_content_by_another_commit_keeps_its_first_provenance(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the artifact is the same to the byte, and DVC reruns nothing after it."""
    first = (make("source") / "provenance.json").read_bytes()
    monkeypatch.setattr(provenance, "git_commit", lambda: "another")
    assert (make("source") / "provenance.json").read_bytes() == first
    assert json.loads((make("source", "changed") / "provenance.json").read_text())["commit"] == "another"


def test_another_machine_or_another_interval_resumes_the_same_work(workspace: Path, change_params) -> None:
    for noun in ("latents", "captions", "teacher", "student/koala-1b"):
        Path("artifacts/smoke", noun).mkdir(parents=True)
        Path("artifacts/smoke", noun, "file").write_text(noun)

    def work() -> Path:
        job = runner.prepare("distill", "koala-1b")
        return job.work(job.hashes())

    here = work()
    change_params(machine={"log_every": 77, "compile": ["BasicTransformerBlock"], "micro_batch": 1})
    assert work() == here
    os.environ["KOALA_MACHINE"] = "8xgpu-80gb"
    try:
        assert work() == here
    finally:
        del os.environ["KOALA_MACHINE"]
    change_params(sampling={"prompts": ["another"]})
    assert work() == here
    change_params(distill={"learning_rate": 1.0})
    assert work() != here


def test_the_second_run_in_a_work_folder_is_refused_and_a_killed_one_is_resumed(workspace: Path) -> None:
    code = """
import time
from koala import runner
def waits(config, out, run):
    (out / "half").write_text("finished work")
    print("ready", flush=True)
    time.sleep(60)
runner.prepare("source").run(waits)
"""
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout
        assert first.stdout.readline() == "ready\n"
        with pytest.raises(
            KoalaError, match="is in use by another run of this stage: wait for it, or stop it"
        ) as error:
            make("source")
        assert "\n" not in str(error.value)
    finally:
        first.kill()
        first.wait()
    assert make("source") == TABLE  # the lock goes with its process
    assert {path.name for path in TABLE.iterdir()} == {"half", "made", "provenance.json"}


def test_unfinished_work_of_another_recipe_is_named(workspace: Path, change_params, capsys) -> None:
    with pytest.raises(KeyboardInterrupt):
        runner.prepare("source").run(interrupted)
    change_params(source={"rows": 121})
    make("source")
    said = capsys.readouterr().err
    assert "holds work of another recipe: rows 120 (now 121); it will not be resumed" in said


def test_finished_work_that_keeps_its_state_is_not_named(workspace: Path, change_params, capsys) -> None:
    def keeps_state(config: Config, out: Path, run: object) -> None:
        (out / STATE).mkdir(exist_ok=True)
        (out / STATE / "kept").touch()

    runner.prepare("source").run(keeps_state)
    change_params(source={"rows": 121})
    make("source")
    assert "will not be resumed" not in capsys.readouterr().err


@pytest.fixture
def other_disk(workspace: Path) -> Iterator[Path]:
    """artifacts/ on a file system of its own."""
    disk = Path("artifacts")
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_an_artifact_moves_across_file_systems(other_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(config: Config, out: Path, run: object) -> None:
        (out / "sub").mkdir(exist_ok=True)
        with (out / "sub/calls").open("a") as calls:
            calls.write("x")

    job = runner.prepare("source")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # killed while it copies
            job.run(stage)
    assert not TABLE.exists()
    for calls in ("xx", "x"):
        runner.prepare("source").run(stage)
        assert (TABLE / "sub/calls").read_text() == calls
        assert provenance.read(TABLE)["stage"] == "source"
        assert [path.name for path in TABLE.parent.iterdir()] == ["table"]
        assert [path.name for path in Path("runs/source").iterdir()] == ["provenance.json"]


def test_a_copy_that_does_not_fit_leaves_the_artifact_before(other_disk: Path) -> None:
    make("source", "before")
    free = shutil.disk_usage(other_disk).free
    subprocess.run(["mount", "-o", "remount,size=64k", other_disk], check=True)

    def large(config: Config, out: Path, run: object) -> None:
        (out / "made").write_bytes(b"0" * 200_000)

    with pytest.raises(KoalaError, match=r"the disk is full at .*No space left"):
        runner.prepare("source").run(large)
    assert (TABLE / "made").read_text() == "before"
    subprocess.run(["mount", "-o", f"remount,size={free}", other_disk], check=True)
    runner.prepare("source").run(large)
    assert (TABLE / "made").stat().st_size == 200_000


# What a stage by row made last, with a real DVC.

CODE, IMAGES = Path("code"), Path("artifacts/smoke/images")
LOOKS = """
from pathlib import Path
from koala import runner
def looks(config, out, run, **inputs):
    found = list((out / "state/earlier").rglob("*"))
    with Path("found").open("a") as lines:
        print(*[file.read_text() for file in found if file.name == "made"] or ["nothing"], file=lines)
    (out / "made").write_text(next(iter(inputs.values())).joinpath("made").read_text())
if __name__ == "__main__":
    runner.prepare("download").run(looks)
"""


@pytest.fixture
def by_row(workspace: Path) -> Path:
    """A checkout with DVC and without git, the current folder. Its stages by row have two files among their deps."""
    document = yaml.safe_load(Path("dvc.yaml").read_text())
    document = {"stages": {name: document["stages"][name] for name in ("source", "download", "filter", "encode")}}
    for stage in document["stages"].values():
        stage["deps"] = [dep for dep in stage["deps"] if dep.startswith("artifacts/")] + ["forget.yaml", str(CODE)]
    document["stages"]["download"]["cmd"] = f"{sys.executable} looks.py"
    Path("dvc.yaml").write_text(yaml.safe_dump(document))
    Path("looks.py").write_text(LOOKS)
    CODE.write_text("first")
    Repo.init(no_scm=True).close()
    return workspace


def looks(config: Config, out: Path, run: object, **inputs: Path) -> None:
    namespace: dict[str, Any] = {}
    exec(LOOKS, namespace)
    namespace["looks"](config, out, run, **inputs)


def found() -> list[str]:
    """What each run saw of what was made last."""
    return Path("found").read_text().splitlines()


def record(*stages: str) -> None:
    """Have dvc.lock and the cache know what is there, as after `dvc repro`."""
    with Repo() as repo:
        for stage in stages:
            repo.commit(stage, force=True)


def download(table: str) -> None:
    make("source", table)
    runner.prepare("download").run(looks)


def test_a_stage_by_row_finds_what_it_made_last_of_other_inputs(by_row: Path, change_params) -> None:
    """Not of the same inputs, by another recipe, or by other code."""
    download("a")
    record("source", "download")
    shutil.rmtree(IMAGES)  # as DVC does before it runs a stage
    download("b")
    assert {path.name for path in IMAGES.iterdir()} == {"made", "provenance.json"}
    assert (IMAGES / "made").read_text() == "b"
    record("source", "download")
    download("b")
    download("c")
    assert found() == ["nothing", "a", "nothing", "b"]
    CODE.write_text("second")
    download("c")
    record("source", "download")
    download("d")
    forget.add("asked for", url="https://example.com/1")
    download("d")
    record("source", "download")
    change_params(download={"image_size": 64})
    download("e")
    assert found()[4:] == ["nothing", "c", "nothing", "nothing"]


@pytest.mark.usefixtures("forked")
def test_a_checkout_without_it_fetches_it_while_dvc_runs_the_stage(
    by_row: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    remote = tmp_path_factory.mktemp("remote")
    Path(".dvc/config").write_text(
        Path(".dvc/config").read_text() + f"    remote = all\n['remote \"all\"']\n    url = {remote}\n"
    )
    download("a")
    record("source", "download")
    with Repo() as repo:
        repo.push()
    other = tmp_path_factory.mktemp("other") / "checkout"
    shutil.copytree(by_row, other, symlinks=True, ignore=shutil.ignore_patterns("cache", "images", "found", "runs"))
    monkeypatch.chdir(other)
    make("source", "b")
    done = subprocess.run([sys.executable, "-m", "dvc", "repro", "--single-item", "download"], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert found() == ["a"]
    download("c")
    assert found() == ["a", "b"]
    # Nobody pushed this. Then there is no remote.
    capsys.readouterr()
    for reason in ("neither in DVC's cache nor on its remote", "DVC has no remote"):
        shutil.rmtree(".dvc/cache", ignore_errors=True)
        download("d")
        assert found()[-1] == "nothing"
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "made last" in line]
        assert line.startswith("download: what was made last cannot be had (")
        assert reason in line
        Path(".dvc/config").write_text("[core]\n    no_scm = True\n")


@pytest.mark.parametrize("lock", ["", "stages: []", "stages: {download: {outs: [{path: x}]}}", "\t", "schema: '9'"])
def test_a_lock_that_says_nothing_of_the_last_run_stops_nobody(workspace: Path, lock: str) -> None:
    Path("dvc.lock").write_text(lock)
    make("source")
    runner.prepare("download").run(looks)
    assert found() == ["nothing"]


def test_a_lock_where_dvc_is_not_set_up_stops_nobody(workspace: Path, capsys: Any) -> None:
    outs = [{"path": str(IMAGES), "md5": f"{0:032}.dir"}]
    Path("dvc.lock").write_text(yaml.safe_dump({"stages": {"download": {"deps": [], "outs": outs}}}))
    make("source")
    runner.prepare("download").run(looks)
    assert found() == ["nothing"]
    assert (
        "download: what was made last cannot be had (you are not inside of a DVC repository" in capsys.readouterr().err
    )


def test_latents_are_offered_for_other_images_not_for_another_teacher(by_row: Path) -> None:
    for noun, text in (("kept", "a"), ("teacher", "a"), ("kept", "b"), ("teacher", "b")):
        folder = Path("artifacts/smoke", noun)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "made").write_text(text)
        if Path("artifacts/smoke/teacher").exists():
            runner.prepare("encode").run(looks)
            record("encode")
    assert found() == ["nothing", "a", "nothing"]


def test_the_filter_finds_what_it_judged_also_after_a_takedown_and_another_quota(by_row: Path, change_params) -> None:
    """But none of the shards that it wrote, and nothing by other rules."""

    def judges(config: Config, images: Path, scores: Path, out: Path, run: object) -> None:
        earlier = out / STATE / EARLIER
        seen.append({file.relative_to(earlier).as_posix() for file in earlier.rglob("*") if file.is_file()})
        for name in ("judged/0", "verdicts/0", "manifest.json", "00000.tar"):
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text(name)

    def run() -> set[str]:
        runner.prepare("filter").run(judges)
        record("filter")
        return seen[-1]

    seen: list[set[str]] = []
    for noun in ("images", "scores"):
        Path("artifacts/smoke", noun).mkdir(parents=True)
    all_of_it = {"judged/0", "verdicts/0", "manifest.json"}
    assert run() == set()
    assert run() == set(), "the same again"
    Path("artifacts/smoke/images/made").write_text("other images")
    assert run() == all_of_it
    forget.add("asked for", url="https://example.com/1")
    assert run() == all_of_it
    change_params(filter={"quotas": [{"by": "host", "at_most": 3}]})
    assert run() == all_of_it
    change_params(filter={"rules": {"words": {"at_least": 7}}})
    assert run() == set()
