"""The flow, on a real Prefect server and a tiny DVC project."""

import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import State

from flows import distill as module
from flows.distill import distill, stage_task
from flows.stages import pipeline
from koala.provenance import git_commit


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
    commit: str


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
        patch.delenv("KOALA_MACHINE", raising=False)
        git_commit.cache_clear()
        state = distill("koala-a", return_state=True)
        git_commit.cache_clear()
    assert state.is_completed()
    return Finished(flow_run_id(state), project, commit(project))


def commit(project: Path) -> str:
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True, check=True
    ).stdout.strip()


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
        time.sleep(0.05)


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
    assert not (finished.project / "artifacts/demo/release/koala-b").exists()


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
    assert set(artifacts) == {f"koala-a-{name}" for name in ("summary", "grid", "report", "mlflow", "release")}
    assert "| teacher | 6 M |" in artifacts["koala-a-summary"]
    assert str(finished.project / "artifacts/demo/release/koala-a") in artifacts["koala-a-release"]

    (run,) = mlflow_runs(mlflow_store, finished.id)
    assert run.info.status == "FINISHED"
    logged = {file.path for file in MlflowClient(tracking_uri=mlflow_store).list_artifacts(run.info.run_id)}
    assert logged == {"grid.png", "report.html", "summary.md"}
    assert artifacts["koala-a-grid"].endswith(f"/get-artifact?path=grid.png&run_uuid={run.info.run_id}")
    assert run.info.run_id in artifacts["koala-a-mlflow"]


def test_both_runs_say_student_commit_and_cause_and_link_to_each_other(
    client: SyncPrefectClient, finished: Finished, mlflow_store: str
) -> None:
    name = f"distill koala-a {finished.commit[:7]}: by hand"
    assert client.read_flow_run(finished.id).name == name
    (run,) = mlflow_runs(mlflow_store, finished.id)
    assert run.info.run_name == name
    assert run.data.tags["because"] == "by hand"
    page = str(client.api_url).removesuffix("/").removesuffix("/api")
    assert run.data.tags["mlflow.note.content"] == f"[{name}]({page}/runs/flow-run/{finished.id})"


def test_the_parent_run_compares_with_another_students(finished: Finished, mlflow_store: str) -> None:
    (run,) = mlflow_runs(mlflow_store, finished.id)
    assert run.data.metrics == {"unet_parameters": 2.0, "attributes/all": 0.8, "size_of_teacher": 0.33}
    assert run.data.params == {
        "student": "koala-a",
        "profile": "demo",
        "machine": "toaster",
        "commit": finished.commit,
    }
    view = (
        MlflowClient(tracking_uri=mlflow_store)
        .get_experiment_by_name("koala-demo")
        .tags["mlflow.sharedViewState.koala"]
    )
    assert "metrics.`attributes/all`" in view  # the list of runs shows it


def test_a_failure_says_what_the_stage_said_and_stops_there(here: Path, mlflow_store: str) -> None:
    (here / "do.py").write_text(
        "if out.name == 'heat': print('koala: the oven is cold: light it', file=sys.stderr); sys.exit(2)"
    )
    state = distill("koala-a", return_state=True)
    assert state.is_failed()
    assert state.message == "heat: koala: the oven is cold: light it"
    assert not (here / "artifacts/demo/evaluation").exists()
    assert [run.info.status for run in mlflow_runs(mlflow_store, flow_run_id(state))] == ["FAILED"]


@pytest.mark.filterwarnings("ignore:Logger 'prefect.task_runs' attempted to send logs")
@pytest.mark.parametrize(
    ("stage", "end", "tries"),
    [
        ("knead", "sys.exit(1)", 2),  # uses the network, says dvc.yaml
        ("heat", "sys.exit(1)", 1),  # does not
        ("knead", "sys.exit(2)", 1),  # the user must fix something
        ("knead", "os.kill(os.getpid(), 15)", 1),  # someone stopped it
    ],
)
def test_what_is_retried(here: Path, stage: str, end: str, tries: int) -> None:
    (here / "do.py").write_text(f"if out.name == {stage!r}: open('tries', 'a').write('x'); {end}")
    task = stage_task(next(one for one in pipeline("publish@koala-a") if one.name == stage))
    state = task(stage, "a-flow-run", "a-parent-run", return_state=True)
    assert state.is_failed()
    assert (here / "tries").read_text() == "x" * tries


def test_the_program_stops_on_sigterm_without_a_trace(
    client: SyncPrefectClient, project: Path, lingering, start: Callable[..., subprocess.Popen[str]]
) -> None:
    program = start("-m", "flows.distill", "koala-a", PREFECT_API_URL=str(client.api_url).rstrip("/"))
    lingering.wait()
    family = psutil.Process(program.pid).children(recursive=True)
    program.send_signal(signal.SIGTERM)
    assert program.wait(30) == 128 + signal.SIGTERM
    assert lingering.saved
    lingering.wait_until_gone(10)
    assert [process for process in family if process.is_running()] == []


@pytest.mark.usefixtures("with_tables")
def test_the_program_is_killed_and_interrupted_without_a_trace_and_resumes(
    project: Path,
    lingering,
    start: Callable[..., subprocess.Popen[str]],
    outside: dict[str, str],
    mlflow_store: str,
    request: pytest.FixtureRequest,
) -> None:
    """One test, since a server takes a while to start: each step needs the one before."""

    def begin() -> tuple[subprocess.Popen[str], list[psutil.Process]]:
        program = start("-m", "flows.distill", "koala-a")
        lingering.wait()
        return program, psutil.Process(program.pid).children(recursive=True)  # the temporary server too

    # Killed: nobody is left to end the stage, nor the server, but those end by themselves.
    program, family = begin()
    assert any("prefect" in " ".join(process.cmdline()) for process in family)
    program.kill()
    program.wait()
    psutil.wait_procs(family, timeout=20)
    assert [process for process in family if process.is_running()] == []
    lingering.wait_until_gone(10)
    assert states(project, "flow_run") == [f"distill koala-a {commit(project)[:7]}: by hand RUNNING"]
    assert "heat RUNNING" in states(project, "task_run")

    # Ctrl-C, which a terminal sends to the whole process group.
    lingering.forget()
    program, family = begin()
    os.killpg(program.pid, signal.SIGINT)
    assert program.wait(30) == 2
    lingering.wait_until_gone(10)
    assert [process for process in family if process.is_running()] == []
    log = (project / "log").read_text()
    assert log.splitlines()[-1] == "distill: stopped: run the same command again to resume"
    assert "Traceback" not in log
    assert "Error logging to API" not in log

    # The same again, to the end: what started by itself twice starts sooner now.
    request.getfixturevalue("forked")
    (project / "do.py").unlink()
    assert start("-m", "flows.distill", "koala-a", "koala-b").wait(120) == 0, (project / "log").read_text()
    log = (project / "log").read_text()
    assert "model    size\n-------  ----\nteacher   6 M" in log
    for student in ("koala-a", "koala-b"):
        assert f"Report:  artifacts/demo/evaluation/{student}/report.html" in log
        assert f"Images:  artifacts/demo/evaluation/{student}/plots/grid.png" in log
        assert f"Release: artifacts/demo/release/{student}" in log
    assert "make serve" in log
    assert "Error logging to API" not in log
    assert log.count("Stage 'knead' didn't change, skipping") == 2  # made before the signal
    assert log.count("Stage 'heat' didn't change, skipping") == 1  # made for the first student
    assert not (Path(outside["HOME"]) / ".prefect").exists()

    # Nothing runs, says Prefect, and says MLflow.
    ends = [line.split()[-1] for line in states(project, "flow_run")]
    assert ends == ["CRASHED", "CRASHED", "COMPLETED", "COMPLETED"]
    assert {line.split()[-1] for line in states(project, "task_run")} == {"CRASHED", "COMPLETED"}
    client = MlflowClient(tracking_uri=mlflow_store)
    experiment = client.get_experiment_by_name("koala-demo").experiment_id
    assert client.search_runs([experiment], "attributes.status = 'RUNNING'") == []


def states(project: Path, table: str) -> list[str]:
    """Name and state of each run in the database of the temporary server, the first one first."""
    with closing(sqlite3.connect(project / ".prefect/prefect.db")) as database:
        rows = database.execute(f"SELECT name || ' ' || state_type FROM {table} ORDER BY created")
        return [row for (row,) in rows]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["panda"], "dvc.yaml has no stage 'publish@panda': choose one of publish@koala-a, publish@koala-b"),
        (["koala-a", "--profile", "sdxl"], "params.yaml says `profile: demo`: this wants `profile: sdxl` there"),
    ],
)
def test_the_program_refuses_what_cannot_be_in_one_line(
    project: Path,
    arguments: list[str],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["flows.distill", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own handlers
    assert module.main() == 2
    assert capsys.readouterr() == ("", f"distill: {line}\n")
    assert not (project / ".prefect").exists()
