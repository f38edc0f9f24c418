"""The stage: real launchers and processes, stopped and resumed, and what it says when it cannot run."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from ranks import Training, alike, free_port, losses, same, weights

from flows.processes import carrying
from koala import runner
from koala.distill.config import DistillConfig
from koala.distill.distill import distill
from koala.distill.job import FILE, Job, checkpoints
from koala.distill.launch import JOB, launch
from koala.distill.train import StopSignal, train
from koala.distill.validation import validate
from koala.errors import KoalaError
from koala.evaluate.config import SamplingConfig
from koala.provenance import read
from koala.run import STATE

STUDENT = "koala-700m"
ROOT = Path(__file__).parents[2]
ChangeParams = Callable[..., None]


def start(*options: str) -> subprocess.Popen[str]:
    koala = Path(sys.executable).with_name("koala")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([koala, "distill", STUDENT, *options], env=environment, text=True, stderr=subprocess.PIPE)


def state_of_work() -> Path:
    job = runner.prepare("distill", STUDENT)
    return job.work(job.hashes()) / "out" / STATE


def wait_for(step: int, process: subprocess.Popen[str], state: Path) -> None:
    """Until the losses show a step."""
    while not (rows := losses(state)) or rows[-1]["step"] < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def only_run(store: str) -> tuple[MlflowClient, str]:
    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("koala-smoke").experiment_id])
    return client, run.info.run_id


RECIPE = {"batch_size": 4}
MACHINE = {"micro_batch": 4, "log_every": 1}


@pytest.mark.timeout(900)
def test_a_stopped_run_resumes_in_the_same_run_of_mlflow(
    distillable: Path, change_params: ChangeParams, request: pytest.FixtureRequest
) -> None:
    """SIGTERM to the stage's process only: it saves, leaves nothing behind, and the next run has no seam."""
    change_params(distill={**RECIPE, "steps": 24}, machine={**MACHINE, "checkpoint_every": 1000, "validate_every": 12})
    state = state_of_work()
    process = start()
    wait_for(3, process, state)
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(30) not in (0, 2)
    assert children
    assert not any(child.is_running() and child.status() != "zombie" for child in children)
    (saved,) = checkpoints(state)
    stopped_at = int(saved.name.removeprefix("step-"))
    assert 3 <= stopped_at < 24

    request.getfixturevalue("forked")  # what started by itself once starts sooner now
    process = start()
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert f"resuming from step {stopped_at}" in said
    out = distillable / "artifacts/smoke/distilled" / STUDENT
    client, run_id = only_run(os.environ["MLFLOW_TRACKING_URI"])
    run = client.get_run(run_id)
    assert run_id == read(out)["run_id"]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["images_per_second"] > 0
    steps = [metric.step for metric in client.get_metric_history(run_id, "loss/total")]
    assert steps == list(range(1, 25))
    assert any("validation" in file.path for file in client.list_artifacts(run_id, "images"))
    assert not state.exists()
    names = {path.name for path in out.iterdir()}
    assert names >= {"model_index.json", "unet", "vae", "kept.json", "curves.csv", "curves.png", "provenance.json"}
    assert not names & {"weight_map.json", "state"}


@pytest.mark.usefixtures("forked")
@pytest.mark.timeout(900)
def test_a_killed_run_leaves_no_seam_in_mlflow(distillable: Path, change_params: ChangeParams) -> None:
    """SIGKILL to all of it between checkpoints: steps that are repeated are not logged again."""
    change_params(distill={**RECIPE, "steps": 24}, machine={**MACHINE, "checkpoint_every": 10, "validate_every": 100})
    state = state_of_work()
    process = start()
    wait_for(13, process, state)
    family = [*carrying(JOB, str((state / FILE).resolve())), psutil.Process(process.pid)]
    assert len(family) > 2
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)
    with (state.parents[1] / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a forked stage ends a moment after what was killed
    client, run_id = only_run(os.environ["MLFLOW_TRACKING_URI"])
    before = client.get_metric_history(run_id, "loss/total")
    resumed_from = int(checkpoints(state)[-1].name.removeprefix("step-"))

    process = start()
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert f"resuming from step {resumed_from}" in said
    after = client.get_metric_history(run_id, "loss/total")
    assert [point.step for point in after] == list(range(1, 25))
    assert [point.value for point in after[: len(before)]] == [point.value for point in before]


@pytest.mark.usefixtures("forked")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launch", ["cpu-two", "fsdp2-cpu"])
def test_the_launch_file_alone_sets_the_number_of_processes(
    make_job: Callable,
    artifacts: Any,
    uncut: Path,
    tmp_path: Path,
    launch: str,
    recorder,
    monkeypatch: pytest.MonkeyPatch,
    capfd,
) -> None:
    """Two processes by accelerate's own launcher give the curve of one."""
    monkeypatch.chdir(ROOT)
    machine = {"launch": f"infra/accelerate/{launch}.yaml", "checkpoint_every": 8}
    job = make_job(machine=machine, schedule="constant", warmup=20)
    one = make_job("one", schedule="constant", warmup=20)
    Training(one).wait()
    distill(job.config, job.latents, artifacts.captions, job.teacher, job.student, tmp_path / "out", recorder)
    assert "distill: 2 processes on cpu" in capfd.readouterr().err
    state = tmp_path / "out" / STATE  # of a constant rate it is kept, with its losses
    shutil.copytree(tmp_path / "out" / "unet", state / "unet")
    alike(state, one.state)


def test_every_validation_is_shown_the_last_and_one_that_was_cut_short_too(
    make_job: Callable, artifacts: Any, tmp_path: Path, recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images take longer than the time between two looks, and all of it may be killed meanwhile."""
    monkeypatch.chdir(ROOT)
    sampling = SamplingConfig(steps=1, guidance=3.0, prompts=("a large red circle",))
    job = make_job(steps=4, sampling=sampling, machine={"validate_every": 2})
    killed = []

    def launch(_: DistillConfig, file: Path, follow: Callable[[], None]) -> None:
        def validate_late(step: int, *rest: Any) -> None:
            follow()
            if step == 4 and not killed:
                killed.append(step)
                raise KeyboardInterrupt
            validate(step, *rest)

        with monkeypatch.context() as patch:
            patch.setattr("koala.distill.train.validate", validate_late)
            train(Job.read(file), StopSignal())
        follow()

    monkeypatch.setattr("koala.distill.distill.launch", launch)
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            distill(job.config, job.latents, artifacts.captions, job.teacher, job.student, tmp_path / "out", recorder)
    assert killed
    assert recorder.images == [("validation", 2), ("validation", 4)]
    assert recorder.steps["loss/total"] == [1, 2, 3, 4]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_kill_while_the_stage_ends_loses_nothing(
    make_job: Callable, artifacts: Any, uncut: Path, tmp_path: Path, recorder, monkeypatch, schedule: str
) -> None:
    """Killed in each of its removals, when one file is gone, and after the last: only a constant rate looks for more steps."""
    trained: list[Path] = []

    def launch(_: DistillConfig, file: Path, follow: Callable[[], None]) -> None:
        rmtree(file.parent / "unet.partial", ignore_errors=True)  # training writes into it, then renames it
        shutil.copytree(uncut, file.parent, dirs_exist_ok=True)
        trained.append(file)

    monkeypatch.setattr("koala.distill.distill.launch", launch)
    job, rmtree = make_job(schedule=schedule), shutil.rmtree
    for kill in range(4):
        out, removals = tmp_path / f"{kill}", iter(range(10))

        def remove(
            folder: Path, *, out: Path = out, kill: int = kill, removals: Any = removals, **options: Any
        ) -> None:
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            if (out / "curves.png").exists() and files and next(removals) == kill:
                files[-1].unlink()
                raise KeyboardInterrupt
            rmtree(folder, **options)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(shutil, "rmtree", remove)
            distill(job.config, job.latents, artifacts.captions, job.teacher, job.student, out, recorder)
        count = len(trained)
        distill(job.config, job.latents, artifacts.captions, job.teacher, job.student, out, recorder)
        assert same(weights(out), weights(uncut)), kill
        if schedule == "cosine":
            assert len(trained) == count, kill
            assert not (out / STATE).exists(), kill
        else:
            assert [file.name for file in checkpoints(out / STATE)] == ["step-00000008"]
    assert next(removals) > 1  # the last was not killed


@pytest.mark.usefixtures("forked")
@pytest.mark.timeout(900)
def test_two_machines_equal_one_process(distillable: Path, change_params: ChangeParams, make_job: Callable) -> None:
    """Two launchers that meet over loopback, as on two machines with a shared disk: one runs the stage, one helps."""
    settings = yaml.safe_load((ROOT / "infra/accelerate/two-nodes-cpu.yaml").read_text())
    (distillable / "two-nodes.yaml").write_text(yaml.safe_dump({**settings, "main_process_port": free_port()}))
    change_params(distill={"batch_size": 4, "steps": 4}, machine={"launch": "two-nodes.yaml", "micro_batch": 2})
    stage, helper = start(), start("--machine-rank", "1")
    said = [process.communicate(timeout=600)[1] for process in (stage, helper)]
    assert [stage.returncode, helper.returncode] == [0, 0], said
    assert "distill: 2 processes on cpu" in said[0]
    assert (distillable / "artifacts/smoke/distilled" / STUDENT / "unet").is_dir()


@pytest.mark.parametrize("status", [0, 3])
def test_a_machine_that_helps_ends_as_its_processes_do(
    make_job: Callable, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """The stage's machine may have taken the trained U-Net away before the helper looks."""
    monkeypatch.chdir(ROOT)
    job = make_job(machine={"launch": "infra/accelerate/two-nodes-cpu.yaml"})
    ranks = [sys.executable, "-c", f"raise SystemExit({status})"]
    monkeypatch.setattr("koala.distill.launch._command", lambda *_: ranks)
    with pytest.raises(SystemExit, match=f"{status}") if status else contextlib.nullcontext():
        launch(job.config, job.write(), machine_rank=1)


@pytest.mark.usefixtures("forked")
def test_a_gradient_that_stays_non_finite_stops_training_with_the_state_saved(
    make_job: Callable, artifacts: Any, tmp_path: Path, recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    job = make_job(learning_rate=1e30, warmup=0, steps=50, machine={"max_bad_steps": 2, "checkpoint_every": 1000})
    line = r"stopped at step \d+: 2 steps in a row .* the term task is not finite for samples 0000000\d\d, "
    with pytest.raises(KoalaError, match=line):
        distill(job.config, job.latents, artifacts.captions, job.teacher, job.student, tmp_path / "out", recorder)
    assert len(checkpoints(tmp_path / "out" / STATE)) == 1


@pytest.mark.usefixtures("forked")
def test_a_machine_rank_that_is_not_there_is_one_line(distillable: Path) -> None:
    process = start("--machine-rank", "3")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "has 1 machines, ranks 0 to 0: there is no rank 3" in said


def test_the_job_is_what_ranks_read(make_job: Callable) -> None:
    job = make_job(features=[{"kind": "self_attention", "stages": ["UP1"]}])
    file = job.write()
    assert file.is_absolute()
    assert type(job).read(file) == job
    assert json.loads(file.read_text())["config"]["features"][0]["kind"] == "self_attention"
