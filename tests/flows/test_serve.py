"""`make serve`: a server, a worker and deployments, from start to end."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from flows.processes import carrying
from flows.serve import SERVICE

ROOT = Path(__file__).parents[2]
PREFECT = Path(sys.executable).parent / "prefect"
SERVICES = ("mlflow", "prefect-server", "prefect-worker")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("which", ["prefect", "mlflow"])
def test_a_port_in_use_is_one_line_before_anything_starts(
    start: Callable[..., subprocess.Popen[str]], project: Path, which: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = {"prefect": free_port(), "mlflow": free_port()} | {which: taken.getsockname()[1]}
        arguments = [f"--{name}-port={port}" for name, port in ports.items()]
        assert start("-m", "flows.serve", *arguments).wait(60) == 2
    (line,) = (project / "log").read_text().splitlines()
    assert f"port {ports[which]} is in use" in line
    assert f"make serve {which.upper()}_PORT=" in line
    assert not (project / ".prefect").exists()


def test_the_schedules_are_off() -> None:
    deployments = yaml.safe_load((ROOT / "infra/prefect.yaml").read_text())["deployments"]
    assert {one["name"]: one["parameters"]["student"] for one in deployments} == {
        "koala-700m": "koala-700m",
        "koala-1b": "koala-1b",
    }
    assert [schedule["active"] for one in deployments for schedule in one["schedules"]] == [False, False]


def test_runs_are_cancelled_and_lost_and_ended_without_a_trace(
    start: Callable[..., subprocess.Popen[str]], project: Path, outside: dict[str, str], lingering
) -> None:
    """One test, since a server takes half a minute: each step needs the one before."""
    (project / "infra").mkdir()
    deployments = (
        (ROOT / "infra/prefect.yaml").read_text().replace("koala-700m", "koala-a").replace("koala-1b", "koala-b")
    )
    (project / "infra/prefect.yaml").write_text(deployments)
    port = free_port()
    environment = {**outside, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}

    def prefect(*arguments: str) -> str:
        done = subprocess.run([PREFECT, *arguments], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def state(run: str) -> str:
        found = re.search(r"type=StateType\.(\w+)", prefect("flow-run", "inspect", run))
        assert found
        return found[1]

    def until_state(run: str, wanted: str) -> None:
        deadline = time.monotonic() + 40
        while (now := state(run)) != wanted:
            assert time.monotonic() < deadline, f"{now}, not {wanted}:\n{log.read_text()}"
            time.sleep(1)

    def run() -> str:
        found = re.search(r"UUID: (\S+)", prefect("deployment", "run", "distill/koala-a"))
        assert found
        lingering.wait()
        return found[1]

    log = project / "log"
    serve = start("-m", "flows.serve", f"--prefect-port={port}", f"--mlflow-port={free_port()}")
    deadline = time.monotonic() + 180
    while "in another terminal" not in log.read_text():
        assert serve.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)

    # Cancelled: the stage saves its work, and both of its processes are gone.
    cancelled = run()
    prefect("flow-run", "cancel", cancelled)
    lingering.wait_until_gone(40)
    assert lingering.saved
    until_state(cancelled, "CANCELLED")

    # Killed: the worker ends the stage that was left.
    lingering.forget()
    lost = run()
    (stage, *_) = lingering.left()
    dvc = psutil.Process(stage).parents()
    engine = next(process for process in dvc if "prefect.engine" in process.cmdline())
    os.kill(engine.pid, signal.SIGKILL)
    lingering.wait_until_gone(40)
    until_state(lost, "CRASHED")

    # The end of it all, a run in progress included.
    lingering.forget()
    run()
    serve.send_signal(signal.SIGTERM)
    assert serve.wait(90) == 0, log.read_text()
    assert lingering.left() == []
    assert lingering.saved
    assert [process for name in SERVICES for process in carrying(SERVICE, f"{name}-{serve.pid}")] == []
