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
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling

from flows.processes import carrying
from flows.services import SERVICE, free_port

PREFECT = Path(sys.executable).parent / "prefect"
MARK = "FLOWS_TEST"  # of conftest.py


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


def test_a_killed_serve_leaves_no_service(start: Callable[..., subprocess.Popen[str]], project: Path) -> None:
    serve = start("-m", "flows.serve", f"--prefect-port={free_port()}", f"--mlflow-port={free_port()}")
    log = project / "log"
    services = ("mlflow", "prefect-server")
    wait_until(lambda: all(len(serving(name, serve)) > 1 for name in services), 60, serve, log)  # a guard and a program
    serve.kill()
    serve.wait()
    deadline = time.monotonic() + 30
    while left := [process for name in services for process in serving(name, serve)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@pytest.mark.usefixtures("with_tables", "forked")
def test_runs_are_cancelled_and_lost_and_ended_without_a_trace(
    start: Callable[..., subprocess.Popen[str]], project: Path, outside: dict[str, str], lingering
) -> None:
    """One test, since a server takes half a minute: each step needs the one before."""
    log = project / "log"
    port = free_port()
    serve = start("-m", "flows.serve", f"--prefect-port={port}", f"--mlflow-port={free_port()}")
    wait_until(lambda: "in another terminal" in log.read_text(), 180, serve, log)
    address = f"http://127.0.0.1:{port}/api"
    assert "prefect deployment run distill/koala-a --watch" in log.read_text()

    with temporary_settings({PREFECT_API_URL: address}), get_client(sync_client=True) as client:

        def ends_as(state: str, run: UUID) -> None:
            ended = f"StateType.{state}"
            wait_until(lambda: str(client.read_flow_run(run).state_type) == ended, 40, serve, log, poll=0.5)

        def run() -> UUID:
            run = client.create_flow_run_from_deployment(client.read_deployment_by_name("distill/koala-a").id)
            lingering.wait()
            return run.id

        # Cancelled: the stage saves its work, and both of its processes are gone.
        command = [PREFECT, "deployment", "run", "distill/koala-a"]
        told = subprocess.run(command, env={**outside, "PREFECT_API_URL": address}, capture_output=True, text=True)
        found = re.search(r"UUID: (\S+)", told.stdout)
        assert found, told.stdout + told.stderr
        cancelled = UUID(found[1])
        lingering.wait()
        assert client.read_flow_run(cancelled).name.startswith("distill koala-a ")
        client.set_flow_run_state(cancelled, Cancelling())
        lingering.wait_until_gone(40)
        assert lingering.saved
        ends_as("CANCELLED", cancelled)

        # Killed: the worker ends the stage that was left.
        lingering.forget()
        killed = run()
        (engine,) = (one for one in carrying(MARK, str(project)) if "prefect.engine" in one.cmdline())
        engine.kill()
        lingering.wait_until_gone(40)
        ends_as("CRASHED", killed)

        # The end of it all, a run in progress included: it still tells the server.
        lingering.forget()
        run()
    serve.send_signal(signal.SIGTERM)
    assert serve.wait(90) == 0, log.read_text()
    lingering.wait_until_gone(10)
    assert lingering.saved
    assert "Finished in state Crashed" in log.read_text()
    assert carrying(MARK, str(project)) == []  # neither service nor run


def serving(name: str, serve: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of one service."""
    return carrying(SERVICE, f"{name}-{serve.pid}")


def wait_until(
    holds: Callable[[], bool], seconds: float, program: subprocess.Popen[str], log: Path, poll: float = 0.1
) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert program.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(poll)
