"""A tiny DVC project, with the flow's own code in it, and Prefect and MLflow to run it on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]

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
      cmd: python stage.py artifacts/demo/evaluate/${key}
      deps: ["artifacts/${profile}/heat", "artifacts/${profile}/knead"]
      outs: ["artifacts/${profile}/evaluate/${key}"]
  publish:
    foreach: ${students}
    do:
      cmd: python stage.py artifacts/demo/publish/${key}
      deps: ["artifacts/${profile}/evaluate/${key}"]
      outs: ["artifacts/${profile}/publish/${key}"]
"""

# Each stage makes its folder. What else it does, the test writes into the file do.py.
STAGE_PY = """
import os, sys
from pathlib import Path

out = Path(sys.argv[1])
out.mkdir(parents=True)
print(f"making {out.name} in {os.environ['KOALA_PARENT_RUN']}")
if "evaluate" in out.parts:
    (out / "grid.png").write_bytes(b"a picture")
    (out / "summary.md").write_text("| model | size |\\n|---|---|\\n| teacher | 6 M |")
    (out / "summary.txt").write_text("model    size\\n-------  ----\\nteacher   6 M\\n")
if Path("do.py").exists():
    exec(Path("do.py").read_text())
(out / "done").write_text("yes")
"""

# Two processes, one of them in a session of its own, as accelerate's ranks are. Their ids go to the file pids.
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
        (folder / "flows").symlink_to(ROOT / "flows")
        (folder / "prefect.toml").write_text((ROOT / "prefect.toml").read_text())
        (folder / "params.yaml").write_text("profile: demo\nstudents: {koala-a: {x: 1}, koala-b: {x: 2}}\n")
        (folder / "dvc.yaml").write_text(DVC_YAML)
        (folder / "stage.py").write_text(STAGE_PY)
        for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
            subprocess.run(command, cwd=folder, check=True)

    return make


@pytest.fixture
def project(tmp_path: Path, make_project: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project, as the current directory."""
    make_project(tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for all: making the tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def outside(project: Path, mlflow_store: str, tmp_path: Path) -> dict[str, str]:
    """The environment for a program started in the project: nothing of the user's or of this test run's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "KOALA", "MLFLOW"))}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**kept, "HOME": str(tmp_path), "PYTHONPATH": path, "MLFLOW_TRACKING_URI": mlflow_store}


@pytest.fixture
def start(project: Path, outside: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `python ...` in the project, its output in the file `log`; asks it to end after the test, if it still runs."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        with (project / "log").open("w") as log:
            command = [sys.executable, *arguments]
            started.append(subprocess.Popen(command, env=outside, stdout=log, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


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
            time.sleep(0.1)

    def left(self) -> list[int]:
        """Those of its processes that still run."""
        return [pid for pid in map(int, (self._project / "pids").read_text().split()) if psutil.pid_exists(pid)]

    def wait_until_gone(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.left():
            assert time.monotonic() < deadline, f"{self.left()} run on:\n{(self._project / 'log').read_text()}"
            time.sleep(0.1)

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
