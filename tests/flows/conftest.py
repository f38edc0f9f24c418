"""A tiny DVC project, with the flow's own code in it, and Prefect and MLflow to run it on."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.testing import utilities
from prefect.testing.utilities import prefect_test_harness
from ranks import free_port

from flows import deployments
from flows.processes import carrying
from flows.services import prefect_server
from koala.provenance import git_commit

# Prefect's services wait for their threads when a process ends. A process that a later test forks has none of them, and would fail.
os.register_at_fork(after_in_child=threading._threading_atexits.clear)

ROOT = Path(__file__).parents[2]

# Variable that all processes of a test carry, so that a test can see what it left.
MARK = "FLOWS_TEST"

# Variable that all processes of a machine carry.
MACHINE = "TEAM_MACHINE"

# Stages that koala knows nothing of, so that a list of stages in flows/ would not pass.
DVC_YAML = """
stages:
  knead:
    cmd: python stage.py artifacts/demo/knead
    outs: ["artifacts/${profile}/knead"]
    meta: {retries: 1}
  heat:
    cmd: python stage.py artifacts/demo/heat
    outs: ["artifacts/${profile}/heat"]
  evaluate:
    foreach: ${students}
    do:
      cmd: python stage.py artifacts/demo/evaluation/${key}
      deps: ["artifacts/${profile}/heat", "artifacts/${profile}/knead"]
      metrics: ["artifacts/${profile}/evaluation/${key}/metrics.json"]
      outs:
        - artifacts/${profile}/evaluation/${key}/plots
        - artifacts/${profile}/evaluation/${key}/report.html
        - artifacts/${profile}/evaluation/${key}/summary.md
        - artifacts/${profile}/evaluation/${key}/summary.txt
  publish:
    foreach: ${students}
    do:
      cmd: python stage.py artifacts/demo/release/${key}
      deps: ["artifacts/${profile}/evaluation/${key}"]
      outs: ["artifacts/${profile}/release/${key}"]
"""

PARAMS = "profile: demo\nmachine: toaster\nstudents: {koala-a: {x: 1}, koala-b: {x: 2}}\n"

METRICS = {
    "teacher": {"unet_parameters": 6.0, "attributes/all": 0.9},
    "before": {"unet_parameters": 2.0, "attributes/all": 0.1},
    "after": {"unet_parameters": 2.0, "attributes/all": 0.8},
    "size_of_teacher": 0.33,
}

# Each stage makes its folder. What else it does, the test writes into the file do.py.
STAGE_PY = f"""
import json, os, sys
from pathlib import Path

out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
print(f"making {{out.name}} in {{os.environ['KOALA_PARENT_RUN']}}")
if "evaluation" in out.parts:
    (out / "plots").mkdir(exist_ok=True)
    (out / "plots/grid.png").write_bytes(b"an image")
    (out / "metrics.json").write_text(json.dumps({METRICS!r}))
    (out / "summary.md").write_text("| model | size |\\n|---|---|\\n| teacher | 6 M |")
    (out / "report.html").write_text("<p>a report</p>")
    (out / "summary.txt").write_text("model    size\\n-------  ----\\nteacher   6 M\\n")
if Path("do.py").exists():
    exec(Path("do.py").read_text())
(out / "done").write_text("yes")
"""

# Two processes, one of them in its own session, as accelerate's ranks are. Their ids go to the file pids.
LINGER = """
if out.name == "heat":
    import signal, subprocess, time
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    def save(*_):
        Path("saved").write_text("yes")
        sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    Path("pids.part").write_text(f"{os.getpid()} {child.pid}")
    os.rename("pids.part", "pids")
    time.sleep(600)
"""


@pytest.fixture(scope="session")
def make_project() -> Callable[[Path], None]:
    """Makes a folder a project of two stages and two more for each of two students."""

    def make(folder: Path) -> None:
        folder.mkdir()
        for name in ("flows", "infra"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "prefect.toml").write_text((ROOT / "prefect.toml").read_text())
        (folder / "params.yaml").write_text(PARAMS)
        (folder / "dvc.yaml").write_text(DVC_YAML)
        (folder / "stage.py").write_text(STAGE_PY)
        for command in (
            ["git", "init", "--quiet"],
            [sys.executable, "-m", "dvc", "init", "--quiet"],
            ["cp", ROOT / ".dvc/config", ".dvc/config"],  # no usage data: DVC sends it from a process that stays
            ["git", "add", "--all"],
            ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "--message=tiny"],
        ):
            subprocess.run(command, cwd=folder, check=True)

    return make


@pytest.fixture(scope="session")
def blank_project(make_project: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project to copy: making one takes a second."""
    folder = tmp_path_factory.mktemp("blank") / "project"
    make_project(folder)
    return folder


@pytest.fixture
def project(tmp_path: Path, blank_project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project, as the current directory. No process that a test starts in it outlives the test."""
    folder = tmp_path / "project"
    subprocess.run(["cp", "-a", blank_project, folder], check=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv(MARK, str(folder))
    yield folder
    left = carrying(MARK, str(folder))
    told = [process.cmdline() for process in left]
    for process in left:
        process.kill()
    assert told == []


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> str:
    """One store for all tests of flows."""
    return f"sqlite:///{shutil.copy(empty_store, tmp_path_factory.mktemp('flows') / 'mlflow.db')}"


@pytest.fixture(scope="session")
def client(
    tmp_path_factory: pytest.TempPathFactory, programs: Path, prefect_tables: Path
) -> Iterator[SyncPrefectClient]:
    """A client of one Prefect server for all flows that need none of their own; the settings of this process point to it too."""
    folder = tmp_path_factory.mktemp("prefect")
    shutil.copy(prefect_tables, folder / "prefect-test.db")
    with ExitStack() as stack:
        with (
            patch.object(sys, "executable", str(programs / "python")),
            patch.object(utilities, "mkdtemp", return_value=str(folder)),
        ):
            stack.enter_context(prefect_test_harness(server_startup_timeout=120))
        yield stack.enter_context(get_client(sync_client=True))


@pytest.fixture
def with_tables(prefect_tables: Path, project: Path) -> None:
    """Give the project's own Prefect server a database with tables."""
    (project / ".prefect").mkdir()
    shutil.copy(prefect_tables, project / ".prefect/prefect.db")


@pytest.fixture
def outside(project: Path, mlflow_store: str, tmp_path: Path) -> dict[str, str]:
    """The environment for a program started in the project: nothing of the user's or of this test run's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "KOALA", "MLFLOW"))}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"HOME": str(tmp_path), "PYTHONPATH": path, "MLFLOW_TRACKING_URI": mlflow_store}
    return {**kept, **own, "PREFECT_WORKER_QUERY_SECONDS": "1"}


@pytest.fixture
def forked(forked: None, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Prefect's command forked too, where this process calls it."""
    monkeypatch.setattr(deployments, "PREFECT", str(programs / "prefect"))


@pytest.fixture
def start(project: Path, outside: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `python ...` in the project, its output in the file `log`; asks it to end after the test, if it still runs."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        with (project / "log").open("w") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env={**outside, **environment},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,  # a process group, as a terminal gives each command
                )
            )
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@pytest.fixture
def prefect(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that runs all of Prefect's services: that of the other tests never takes back the turn of a run that was lost."""
    port = free_port()
    server = prefect_server(port)
    url = f"http://127.0.0.1:{port}/api"
    server.wait_until(f"{url}/health")
    monkeypatch.setenv("PREFECT_API_URL", url)
    with temporary_settings({PREFECT_API_URL: url}):
        yield url
    server.end()


class Machines:
    """Machines of a team, played by workers in folders of their own, which share nothing but the servers."""

    def __init__(self, server: str, folder: Path, environment: dict[str, str]) -> None:
        self._server = server
        self._folder = folder
        self._environment = environment
        self._workers: list[subprocess.Popen[bytes]] = []

    def join(self, name: str, pool: str, repository: Path) -> None:
        """Have a machine of that name join a pool."""
        command = [sys.executable, "-m", "flows.join", f"--pool={pool}", f"--server={self._server}", "--machine=cpu"]
        command += ["--disk=0.001", f"--folder={self._folder / name}"]
        aws = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
        own = {"KOALA_REPOSITORY": str(repository), MACHINE: name, "OMP_NUM_THREADS": "1"}
        with (self._folder / f"{name}.log").open("wb") as log:
            environment = {**self._environment, **aws, **own}
            self._workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def log(self, name: str) -> str:
        """What a machine printed."""
        return (self._folder / f"{name}.log").read_text()

    def kill(self, name: str) -> None:
        """Kill all processes of a machine, as a power cut would."""
        while processes := carrying(MACHINE, name):
            for process in processes:
                process.kill()
            time.sleep(0.1)

    def leave(self) -> None:
        """Have all machines leave."""
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.wait(60)


@pytest.fixture
def machines(prefect: str, tmp_path: Path, outside: dict[str, str], gpu: Path) -> Iterator[Machines]:
    """A team without machines yet."""
    team = Machines(prefect, tmp_path, {**outside, "PATH": f"{gpu}{os.pathsep}{outside['PATH']}"})
    yield team
    team.leave()
    git_commit.cache_clear()


@pytest.fixture
def gpu(tmp_path: Path) -> Path:
    """A folder with an nvidia-smi that shows one GPU."""
    fake = tmp_path / "bin/nvidia-smi"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'GPU 0: a toaster (UUID: GPU-1)'\n")
    fake.chmod(0o755)
    return fake.parent


class Lingering:
    """A stage `heat` that goes on for minutes, in two processes, until it is told to save its work and leave."""

    def __init__(self, project: Path) -> None:
        self._project = project
        (project / "do.py").write_text(LINGER)

    def wait(self, seconds: float = 90) -> None:
        """Until the stage runs."""
        deadline = time.monotonic() + seconds
        while not (self._project / "pids").exists():
            assert time.monotonic() < deadline, (self._project / "log").read_text()
            time.sleep(0.05)

    def left(self) -> list[int]:
        """Those of its processes that still run."""
        return [pid for pid in map(int, (self._project / "pids").read_text().split()) if psutil.pid_exists(pid)]

    def wait_until_gone(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.left():
            assert time.monotonic() < deadline, f"{self.left()} run on:\n{(self._project / 'log').read_text()}"
            time.sleep(0.05)

    @property
    def saved(self) -> bool:
        return (self._project / "saved").exists()

    def forget(self) -> None:
        """So that a second run can be told from the first."""
        for name in ("pids", "saved"):
            (self._project / name).unlink()


@pytest.fixture
def lingering(project: Path) -> Iterator[Lingering]:
    stage = Lingering(project)
    yield stage
    if (project / "pids").exists():
        for pid in stage.left():
            os.kill(pid, signal.SIGKILL)
