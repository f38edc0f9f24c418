"""`make serve`: a server, a worker and deployments, from start to end."""

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import psutil
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling

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
    deployments = (ROOT / "infra/prefect.yaml").read_text()
    (project / "infra/prefect.yaml").write_text(
        deployments.replace("koala-700m", "koala-a").replace("koala-1b", "koala-b")
    )
    log = project / "log"
    port = free_port()
    serve = start("-m", "flows.serve", f"--prefect-port={port}", f"--mlflow-port={free_port()}")
    wait_until(lambda: "in another terminal" in log.read_text(), 180, serve, log)
    address = f"http://127.0.0.1:{port}/api"

    def run() -> UUID:
        command = [PREFECT, "deployment", "run", "distill/koala-a"]
        told = subprocess.run(command, env={**outside, "PREFECT_API_URL": address}, capture_output=True, text=True)
        lingering.wait()
        found = re.search(r"UUID: (\S+)", told.stdout)
        assert found, told.stdout + told.stderr
        return UUID(found[1])

    with temporary_settings({PREFECT_API_URL: address}), get_client(sync_client=True) as client:

        def ends_as(state: str, run: UUID) -> None:
            wait_until(lambda: str(client.read_flow_run(run).state_type) == f"StateType.{state}", 40, serve, log)

        # Cancelled: the stage saves its work, and both of its processes are gone.
        cancelled = run()
        client.set_flow_run_state(cancelled, Cancelling())
        lingering.wait_until_gone(40)
        assert lingering.saved
        ends_as("CANCELLED", cancelled)

        # Killed: the worker ends the stage that was left.
        lingering.forget()
        killed = run()
        (stage, _) = lingering.left()
        engine = next(one for one in psutil.Process(stage).parents() if "prefect.engine" in one.cmdline())
        engine.kill()
        lingering.wait_until_gone(40)
        ends_as("CRASHED", killed)

        # The end of it all, a run in progress included: it still tells the server.
        lingering.forget()
        run()
    serve.send_signal(signal.SIGTERM)
    assert serve.wait(90) == 0, log.read_text()
    assert lingering.left() == []
    assert lingering.saved
    assert "Finished in state Crashed" in log.read_text()
    assert [process for name in SERVICES for process in carrying(SERVICE, f"{name}-{serve.pid}")] == []


def wait_until(holds: Callable[[], bool], seconds: float, program: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert program.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
