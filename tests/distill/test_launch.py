"""The stage: real processes, stopped and gone on with, and what it says when it cannot go on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from koala import tracking
from koala.config import load
from koala.distill import checkpoint, history, launch
from koala.errors import KoalaError

STUDENT = "koala-700m"
KOALA = Path(sys.executable).with_name("koala")


def start() -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([KOALA, "distill", STUDENT], env=environment, text=True, stderr=subprocess.PIPE)


def wait_for(step: int, process: subprocess.Popen[str], work: Path) -> None:
    """Until the history shows a step."""
    while not (rows := history.read(work)) or rows[-1]["step"] < step:
        assert process.poll() is None
        time.sleep(0.02)


RECIPE = {"batch_size": 4, "micro_batch": 4, "log_every": 1}


@pytest.mark.timeout(300)
def test_a_stopped_run_goes_on_in_the_same_run_of_mlflow(distillable: Path, change_params) -> None:
    """SIGTERM to the stage's process alone: it saves, leaves nothing behind, and the next run has no seam."""
    change_params(distill={**RECIPE, "steps": 40, "checkpoint_every": 1000, "validate_every": 20})
    params = load()
    work = launch.work_folder(params, STUDENT)
    process = start()
    wait_for(3, process, work)
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(30) not in (0, 2)
    assert children and not any(child.is_running() and child.status() != "zombie" for child in children)
    (saved,) = checkpoint.checkpoints(work)
    stopped_at = int(saved.name.removeprefix("step-"))
    assert 3 <= stopped_at < 40

    process = start()
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert f"going on from step {stopped_at}" in said
    out = params.out("distill", STUDENT)
    provenance = json.loads((out / "provenance.json").read_text())
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (run,) = client.search_runs([client.get_experiment_by_name("koala-smoke").experiment_id])
    assert run.info.run_id == provenance["run_id"] and run.info.status == "FINISHED"
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "loss/total")]
    assert steps == list(range(1, 41))
    assert not work.exists()
    assert {path.name for path in out.iterdir()} >= {"model_index.json", "unet", "curves.csv", "curves.png"}


@pytest.mark.timeout(300)
def test_a_killed_run_leaves_no_seam_in_mlflow(distillable: Path, change_params) -> None:
    """SIGKILL to all of it between checkpoints: steps that are done again are not told again."""
    change_params(distill={**RECIPE, "steps": 24, "checkpoint_every": 10, "validate_every": 100})
    work = launch.work_folder(load(), STUDENT)
    process = start()
    wait_for(12, process, work)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)
    (run_id,) = (work / "run_id").read_text().split()
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    before = client.get_metric_history(run_id, "loss/total")
    resumed_from = int(checkpoint.checkpoints(work)[-1].name.removeprefix("step-"))
    assert resumed_from < max(point.step for point in before)

    process = start()
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0 and f"going on from step {resumed_from}" in said, said
    after = client.get_metric_history(run_id, "loss/total")
    assert [point.step for point in after] == list(range(1, 25))
    assert [point.value for point in after[: len(before)]] == [point.value for point in before]


def test_a_gradient_that_stays_non_finite_stops_training_with_the_state_saved(distillable: Path, change_params) -> None:
    change_params(distill={"learning_rate": 1e30, "steps": 50, "max_bad_steps": 2, "checkpoint_every": 1000})
    params = load()
    work = launch.work_folder(params, STUDENT)
    with (
        pytest.raises(
            KoalaError,
            match=r"stopped at step 3: 2 steps in a row .* the term task is not finite for samples 000000012, ",
        ),
        tracking.stage_run(params, "distill", STUDENT, work) as run,
    ):
        launch.run(params, run, STUDENT)
    assert len(checkpoint.checkpoints(work)) == 1


def test_a_missing_launch_configuration_is_said(distillable: Path, change_params) -> None:
    change_params(distill={"launch": "infra/accelerate/nowhere.yaml"})
    params = load()
    with pytest.raises(KoalaError, match="which is not there"), tracking.stage_run(params, "distill", STUDENT) as run:
        launch.run(params, run, STUDENT)
