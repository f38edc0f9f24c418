"""What a team's flow survives: a database that stops, a parent that is killed, a machine's disk that fills.

Prefect and MLflow stand on one Postgres, artifacts on SeaweedFS; a machine is a worker in a folder of its own. `make test-team`.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from postgres import Postgres, postgres
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from ranks import free_port
from space import small_disk

from flows.deployments import deploy
from flows.processes import carrying
from flows.services import Service
from koala.provenance import git_commit

pytestmark = [pytest.mark.team, pytest.mark.timeout(1800)]

STUDENT = "koala-a"
BOOK = "TEAM_BOOK"  # variable with the file in which each computation is noted
ALL = ["evaluation/koala-a", "heat", "knead", "release/koala-a"]
DOWN_SECONDS = 20
SHARDS = 8  # of a megabyte each

# `heat` waits until the test lets it end.
WAITS = f"""
import time
book = Path(os.environ["{BOOK}"])
name = sys.argv[1].removeprefix("artifacts/demo/")
def note(line):
    with book.open("a") as lines:
        lines.write(line + "\\n")
note(name)
if name == "heat":
    while not (book.parent / "go").exists():
        time.sleep(0.1)
"""
# `heat` makes shards in the folder of unfinished work, as koala's stages do, and then its out.
WRITES = f"""
from koala.disk import naming_full_disk
from koala.errors import KoalaError
book = Path(os.environ["{BOOK}"])
def note(line):
    with book.open("a") as lines:
        lines.write(line + "\\n")
if out.name == "heat":
    work = Path("runs/heat")
    work.mkdir(parents=True, exist_ok=True)
    try:
        with naming_full_disk(work):
            for number in range({SHARDS}):
                shard, partial = work / str(number), work / "partial"
                if not shard.exists():
                    partial.write_bytes(bytes([number]) * 1_000_000)
                    os.replace(partial, shard)
                    note(f"shard {{number}}")
            for shard in work.iterdir():
                (out / shard.name).write_bytes(shard.read_bytes())
    except KoalaError as error:
        print(f"koala: {{error}}")
        sys.exit(2)
"""


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """The file in which each computation is noted."""
    return tmp_path / "book"


@pytest.fixture
def database() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


@pytest.fixture
def postgres_for_prefect(database: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", database.address("postgresql+asyncpg", "prefect"))


@pytest.fixture
def prefect(postgres_for_prefect: None, prefect: str) -> str:
    """Prefect's server, on Postgres."""
    return prefect


@pytest.fixture
def outside(
    outside: dict[str, str], strict_bucket: Any, database: Postgres, book: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, str]]:
    """MLflow's server, on Postgres and S3, in the environment of all programs and of this test."""
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("mlflow")),
        "server",
        "--host=127.0.0.1",
        f"--port={port}",
        "--workers=1",
    ]
    command += ["--backend-store-uri", database.address("postgresql+psycopg2", "mlflow")]
    command += ["--artifacts-destination", "s3://koala/mlflow"]
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    server = Service("mlflow", command, log=book.with_name("mlflow.log"))
    url = f"http://127.0.0.1:{port}"
    server.wait_until(f"{url}/health")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    aws = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    yield {**outside, **aws, "MLFLOW_TRACKING_URI": url, BOOK: str(book)}
    server.end()


@pytest.fixture
def parent(
    project: Path, prefect: str, outside: dict[str, str], tmp_path: Path
) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start the worker that runs the flow `distill` itself, in the project."""
    workers = []

    def start() -> subprocess.Popen[bytes]:
        own = {**outside, "PREFECT_API_URL": prefect, "DVC_GLOBAL_CONFIG_DIR": str(tmp_path / "parent")}
        command = [str(Path(sys.executable).with_name("prefect")), "worker", "start", "--pool=local", "--type=process"]
        with (tmp_path / "parent.log").open("ab") as log:
            workers.append(subprocess.Popen(command, env=own, stdout=log, stderr=log))
        return workers[-1]

    yield start
    for worker in workers:
        worker.terminate()
        worker.wait(60)


@pytest.fixture
def team(
    project: Path,
    machines: Any,
    parent: Callable[[], subprocess.Popen[bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Have a team run a project whose stages do that: a parent, whose worker is returned, and a machine in each pool."""

    def start(does: str) -> subprocess.Popen[bytes]:
        document = yaml.safe_load((project / "dvc.yaml").read_text())
        document["stages"]["knead"] |= {"deps": ["stage.py"]}
        document["stages"]["heat"] |= {"deps": ["artifacts/${profile}/knead"], "meta": {"pool": "gpu"}}
        document["stages"]["evaluate"]["do"]["outs"].append("artifacts/${profile}/evaluation/${key}/done")
        (project / "dvc.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
        (project / "do.py").write_text(does)
        config = project / ".dvc/config"
        remote = f"['remote \"team\"']\n    url = s3://koala/dvc\n    endpointurl = {os.environ['AWS_ENDPOINT_URL']}\n"
        config.write_text(config.read_text().replace("[core]", "[core]\n    remote = team", 1) + remote)
        with (project / ".gitignore").open("a") as ignored:
            ignored.write("/runs\n/artifacts\n/.prefect\n")
        git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
        subprocess.run([*git, "add", "--all"], check=True)
        subprocess.run([*git, "commit", "--quiet", "--message=team"], check=True)
        git_commit.cache_clear()
        monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "parent"))
        deploy(pools=True)
        machines.join("anna", "cpu", project)
        machines.join("otto", "gpu", project)
        return parent()

    yield start
    git_commit.cache_clear()


@pytest.fixture
def logs(tmp_path: Path) -> Callable[[], str]:
    return lambda: "\n".join(f"== {file.name}\n{file.read_text()[-6000:]}" for file in sorted(tmp_path.glob("*.log")))


def until(holds: Callable[[], Any], seconds: float, logs: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, logs()
        time.sleep(0.2)


def begin() -> FlowRun:
    run = run_deployment(f"distill/{STUDENT}", timeout=0, as_subflow=False)
    assert isinstance(run, FlowRun)
    return run


def end_of(run: FlowRun, logs: Callable[[], str], seconds: float = 600) -> Any:
    """Wait for the end of a flow run; return its state."""
    with get_client(sync_client=True) as client:
        until(lambda: client.read_flow_run(run.id).state.is_final(), seconds, logs)
        return client.read_flow_run(run.id).state


def noted(book: Path) -> list[str]:
    return sorted(book.read_text().splitlines()) if book.exists() else []


def statuses(flow_run: FlowRun) -> list[str]:
    """How the flow's run in MLflow ended."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiments = [each.experiment_id for each in client.search_experiments()]
    return [run.info.status for run in client.search_runs(experiments, f"tags.flow_run = '{flow_run.id}'")]


def unfinished() -> list[str]:
    """Flow runs that Prefect takes for unfinished."""
    with get_client(sync_client=True) as client:
        return [run.name for run in client.read_flow_runs() if not run.state.is_final()]


def test_postgres_that_stops_for_20_seconds_is_waited_for(
    team: Callable[[str], subprocess.Popen[bytes]], database: Postgres, book: Path, logs: Callable[[], str]
) -> None:
    """Twice: while a stage ends, which the flow must hear of; and while the next begins."""
    team(WAITS)
    run = begin()

    def down() -> None:
        database.stop()
        time.sleep(DOWN_SECONDS)
        database.start()

    until(lambda: "heat" in noted(book), 400, logs)
    outage = threading.Thread(target=down)
    outage.start()
    time.sleep(3)
    (book.parent / "go").touch()
    outage.join()
    until(lambda: "evaluation/koala-a" in noted(book), 400, logs)
    down()
    state = end_of(run, logs)
    assert state.is_completed(), f"{state.message}\n{logs()}"
    assert noted(book) == ALL
    assert statuses(run) == ["FINISHED"]
    assert unfinished() == []


@pytest.mark.parametrize("machine_too", [False, True])
def test_a_parent_that_is_killed_leaves_its_stage_to_the_next_flow(
    team: Callable[[str], subprocess.Popen[bytes]],
    parent: Callable[[], subprocess.Popen[bytes]],
    book: Path,
    logs: Callable[[], str],
    machine_too: bool,
) -> None:
    """Its worker says so; where that is lost with it, Prefect misses its heartbeats, and the next flow closes its run in MLflow."""
    worker = team(WAITS)
    run = begin()
    until(lambda: "heat" in noted(book), 400, logs)
    if machine_too:
        worker.kill()
    for process in carrying("PREFECT__FLOW_RUN_ID", str(run.id)):
        process.send_signal(signal.SIGKILL)
    state = end_of(run, logs, 180)
    assert state.is_crashed(), state
    if machine_too:
        parent()
    else:
        until(lambda: statuses(run) == ["KILLED"], 60, logs)
    with get_client(sync_client=True) as client:  # the stage goes on
        wanted = DeploymentFilter(name=DeploymentFilterName(any_=["gpu"]))
        assert [each.state_name for each in client.read_flow_runs(deployment_filter=wanted)] == ["Running"]
    again = begin()
    (book.parent / "go").touch()
    state = end_of(again, logs)
    assert state.is_completed(), f"{state.message}\n{logs()}"
    assert noted(book) == ALL
    assert (statuses(run), statuses(again)) == (["KILLED"], ["FINISHED"])
    assert unfinished() == []


@pytest.fixture
def more(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Have otto work on a file system of 6 MB, which each call makes larger."""
    (tmp_path / "otto").mkdir()
    try:
        with small_disk(tmp_path / "otto", 6_000_000) as grow:
            yield grow
    except PermissionError:
        pytest.skip("no file system may be mounted here")


def test_a_disk_that_fills_stops_the_stage_which_goes_on_when_there_is_space(
    more: Callable[[], None], team: Callable[[str], subprocess.Popen[bytes]], book: Path, logs: Callable[[], str]
) -> None:
    team(WRITES)
    run = begin()
    state = end_of(run, logs)
    assert state.is_failed(), f"{state}\n{logs()}"
    assert "heat: koala: the disk is full at " in str(state.message)
    assert "free some space there" in str(state.message)
    assert 0 < len(noted(book)) < SHARDS
    for _ in range(8):
        more()
    again = begin()
    state = end_of(again, logs)
    assert state.is_completed(), f"{state.message}\n{logs()}"
    assert noted(book) == [f"shard {number}" for number in range(SHARDS)]
    assert (statuses(run), statuses(again)) == (["FAILED"], ["FINISHED"])
    assert unfinished() == []
