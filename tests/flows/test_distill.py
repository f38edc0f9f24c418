"""The flow, on a real Prefect server and a tiny DVC project."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import State
from prefect.testing.utilities import prefect_test_harness

from flows import distill as module
from flows.distill import distill, stage_task
from flows.stages import pipeline


@pytest.fixture(scope="session")
def client() -> Iterator[SyncPrefectClient]:
    """A Prefect server for the flows that run in this process."""
    with prefect_test_harness(server_startup_timeout=120), get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def here(client: SyncPrefectClient, project: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project for a flow that runs in this process."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    monkeypatch.setattr(module, "RETRY_DELAYS", [0.0])
    return project


@dataclass(frozen=True)
class Finished:
    """A flow run that did all its work."""

    id: UUID
    project: Path


@pytest.fixture(scope="module")
def finished(
    client: SyncPrefectClient,
    mlflow_store: str,
    make_project: Callable[[Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    project = tmp_path_factory.mktemp("finished") / "project"
    make_project(project)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
        state = distill("koala-a", return_state=True)
    assert state.is_completed()
    return Finished(flow_run_id(state), project)


def flow_run_id(state: State) -> UUID:
    assert state.state_details.flow_run_id
    return state.state_details.flow_run_id


def mlflow_runs(store: str, flow_run: UUID) -> list[Run]:
    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("koala-demo")
    return client.search_runs([experiment.experiment_id], f"tags.flow_run = '{flow_run}'")


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    """What a run tells the server arrives a little later."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_each_stage_is_a_task_after_those_it_needs(client: SyncPrefectClient, finished: Finished) -> None:
    wanted = FlowRunFilter(id=FlowRunFilterId(any_=[finished.id]))
    until(lambda: len(client.read_task_runs(flow_run_filter=wanted)) == 4)
    runs = client.read_task_runs(flow_run_filter=wanted)
    names = {run.id: run.name for run in runs}
    upstream = {run.name: {names[one.id] for one in run.task_inputs.get("wait_for", ())} for run in runs}
    assert upstream == {
        "knead": set(),
        "heat": set(),
        "evaluate@koala-a": {"heat", "knead"},
        "publish@koala-a": {"evaluate@koala-a"},
    }
    assert not (finished.project / "artifacts/demo/publish/koala-b").exists()


def test_the_stages_output_is_in_the_runs_log(client: SyncPrefectClient, finished: Finished) -> None:
    wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[finished.id]))
    for stage in ("knead", "heat", "koala-a"):
        start = f"making {stage} in "
        until(lambda start=start: any(log.message.startswith(start) for log in client.read_logs(wanted)))


def test_the_run_ends_with_artifacts_and_a_parent_run(
    client: SyncPrefectClient, finished: Finished, mlflow_store: str
) -> None:
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[finished.id]))
    artifacts = {artifact.key: str(artifact.data) for artifact in client.read_artifacts(artifact_filter=wanted)}
    assert set(artifacts) == {"koala-a-summary", "koala-a-grid", "koala-a-mlflow", "koala-a-release"}
    assert "| teacher | 6 M |" in artifacts["koala-a-summary"]
    assert str(finished.project / "artifacts/demo/publish/koala-a/release") in artifacts["koala-a-release"]

    (run,) = mlflow_runs(mlflow_store, finished.id)
    assert run.info.status == "FINISHED"
    logged = {file.path for file in MlflowClient(tracking_uri=mlflow_store).list_artifacts(run.info.run_id)}
    assert logged == {"grid.png", "summary.md"}
    assert artifacts["koala-a-grid"].endswith(f"/get-artifact?path=grid.png&run_uuid={run.info.run_id}")
    assert run.info.run_id in artifacts["koala-a-mlflow"]


def test_a_failure_says_what_the_stage_said_and_stops_there(here: Path, mlflow_store: str) -> None:
    (here / "do.py").write_text(
        "if out.name == 'heat': print('koala: the oven is cold: light it', file=sys.stderr); sys.exit(2)"
    )
    state = distill("koala-a", return_state=True)
    assert state.is_failed()
    assert state.message == "heat: koala: the oven is cold: light it"
    assert not (here / "artifacts/demo/evaluate").exists()
    assert [run.info.status for run in mlflow_runs(mlflow_store, flow_run_id(state))] == ["FAILED"]


@pytest.mark.filterwarnings("ignore:Logger 'prefect.task_runs' attempted to send logs")
@pytest.mark.parametrize(
    ("stage", "end", "tries"),
    [
        ("knead", "sys.exit(1)", 2),  # uses the network, says dvc.yaml
        ("heat", "sys.exit(1)", 1),  # does not
        ("knead", "sys.exit(2)", 1),  # the user must mend something
        ("knead", "os.kill(os.getpid(), 15)", 1),  # someone stopped it
    ],
)
def test_who_is_tried_again(here: Path, stage: str, end: str, tries: int) -> None:
    (here / "do.py").write_text(f"if out.name == {stage!r}: open('tries', 'a').write('x'); {end}")
    task = stage_task(next(one for one in pipeline("publish@koala-a") if one.name == stage))
    state = task(stage, "a-flow-run", "a-parent-run", return_state=True)
    assert state.is_failed()
    assert (here / "tries").read_text() == "x" * tries


def test_the_program_stops_on_sigterm_without_a_trace_and_goes_on_when_run_again(
    project: Path, lingering, start: Callable[..., subprocess.Popen[str]], outside: dict[str, str]
) -> None:
    program = start("-m", "flows.distill", "koala-a")
    lingering.wait()
    family = psutil.Process(program.pid).children(recursive=True)  # the temporary server too
    program.send_signal(signal.SIGTERM)
    assert program.wait(30) == 128 + signal.SIGTERM
    assert lingering.saved
    assert lingering.left() == []
    assert [process for process in family if process.is_running()] == []

    (project / "do.py").unlink()
    assert start("-m", "flows.distill", "koala-a", "koala-b").wait(120) == 0, (project / "log").read_text()
    log = (project / "log").read_text()
    assert "model    size\n-------  ----\nteacher   6 M" in log
    for student in ("koala-a", "koala-b"):
        assert f"Pictures: artifacts/demo/evaluate/{student}/grid.png" in log
        assert f"Release:  artifacts/demo/publish/{student}/release" in log
    assert "make serve" in log
    assert log.count("Stage 'knead' didn't change, skipping") == 2  # made before the signal
    assert log.count("Stage 'heat' didn't change, skipping") == 1  # made for the first student
    assert not (Path(outside["HOME"]) / ".prefect").exists()


def test_the_program_refuses_what_cannot_be_in_one_line(
    start: Callable[..., subprocess.Popen[str]], project: Path
) -> None:
    assert start("-m", "flows.distill", "panda").wait(60) == 2
    assert (project / "log").read_text().splitlines() == [
        "distill: dvc.yaml has no stage 'publish@panda': choose one of publish@koala-a, publish@koala-b"
    ]
    assert start("-m", "flows.distill", "koala-a", "--profile", "sdxl").wait(60) == 2
    assert (project / "log").read_text().splitlines() == [
        "distill: params.yaml says `profile: demo`: this wants `profile: sdxl` there"
    ]
