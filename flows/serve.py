"""`make serve`: Prefect's server, a worker with all deployments, and MLflow's UI, on loopback, until Ctrl-C.

    python -m flows.serve [--prefect-port 4200] [--mlflow-port 5000]

Whatever ends this (Ctrl-C, SIGTERM, a closed terminal, a service that dies) ends all of it, runs in progress included.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from urllib.error import URLError
from urllib.request import urlopen

import psutil

from flows.processes import end
from flows.repro import clean_up
from koala.tracking import UI

# The variable by which a service and all that it starts are found when it is time to end them.
SERVICE = "KOALA_SERVICE"
# A cancelled run gives its stage 20 s to save its work, and then tells the server.
GRACE_SECONDS = 30.0
START_SECONDS = 180.0

HOME = Path(".prefect")
BIN = Path(sys.executable).parent
PREFECT = str(BIN / "prefect")


class NotServing(Exception):
    """A service did not start, or died. Its text is one line."""


class Service:
    """A program in the background, in a session of its own, so that Ctrl-C reaches this program alone."""

    def __init__(self, name: str, command: Sequence[str], log: Path | None = None) -> None:
        """Start `command`; its output goes to `log`, or to this program's own."""
        self.name = name
        self.log = log
        self.mark = f"{name}-{os.getpid()}"
        with contextlib.ExitStack() as files:
            output = files.enter_context(log.open("wb")) if log else None
            self.process = subprocess.Popen(
                command,
                env={**os.environ, SERVICE: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
            )

    def wait_until(self, address: str) -> None:
        """Return when `address` answers. Raises NotServing."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.check()
            with contextlib.suppress(URLError, TimeoutError, ConnectionError), urlopen(address, timeout=2):
                return
            time.sleep(0.3)
        raise NotServing(f"{self.name} does not answer at {address}{self._see()}")

    def check(self) -> None:
        """Raises NotServing if the program has ended."""
        if (status := self.process.poll()) is not None:
            raise NotServing(f"{self.name} ended with exit status {status}{self._see()}")

    def end(self) -> None:
        """End the program and all that it started: first its children, which may have something to say to it."""
        if self.process.poll() is None:
            children = psutil.Process(self.process.pid).children()
            for child in children:
                child.terminate()
            psutil.wait_procs(children, timeout=GRACE_SECONDS)
        end(SERVICE, self.mark, GRACE_SECONDS)
        self.process.wait()

    def _see(self) -> str:
        return f": see {self.log}" if self.log else ""


def main() -> int:
    """Serve until told to stop. Exit status 2: something must be mended."""
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description="Prefect and MLflow on loopback.")
    parser.add_argument("--prefect-port", type=int, default=4200)
    parser.add_argument("--mlflow-port", type=int, default=5000)
    ports = parser.parse_args()
    for name, port in vars(ports).items():
        if not _is_free(port):
            flag = name.upper()
            print(
                f"serve: port {port} is in use: stop what uses it, or choose another (make serve {flag}=...)",
                file=sys.stderr,
            )
            return 2
    _on_signals(signal.default_int_handler)
    services: list[Service] = []
    status = 0
    try:
        _serve(services, ports.prefect_port, ports.mlflow_port)
    except KeyboardInterrupt:
        print("\nStopping; a stage that trains has 20 s to save its work.", flush=True)
    except NotServing as error:
        print(f"serve: {error}", file=sys.stderr)
        status = 1
    finally:
        _on_signals(signal.SIG_IGN)  # a second Ctrl-C must not leave half of it running
        # The worker first: its runs still have a server to tell how they ended.
        for service in reversed(services):
            service.end()
    return status


def _on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _serve(services: list[Service], prefect_port: int, mlflow_port: int) -> None:
    """Start all services, each one put on the list, and watch them. Ends by an exception."""
    prefect = f"http://127.0.0.1:{prefect_port}"
    store = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    mlflow = store if store.startswith("http") else f"http://127.0.0.1:{mlflow_port}"
    HOME.mkdir(exist_ok=True)
    os.environ |= {
        "PREFECT_HOME": str(HOME.resolve()),
        "PREFECT_API_URL": f"{prefect}/api",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes for what koala has no use for
        UI: mlflow,
    }
    print(f"Starting Prefect and MLflow; their logs are in {HOME}/. Stop with Ctrl-C.", flush=True)
    if mlflow != store:
        command = [str(BIN / "mlflow"), "server", "--backend-store-uri", store, "--host", "127.0.0.1", "--workers", "1"]
        services.append(Service("mlflow", [*command, "--port", str(mlflow_port)], log=HOME / "mlflow.log"))
    command = [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(prefect_port)]
    services.append(Service("prefect-server", command, log=HOME / "server.log"))
    services[-1].wait_until(f"{prefect}/api/health")
    _close_lost_runs()
    _prefect("work-pool", "create", "local", "--type", "process", "--overwrite")
    _prefect("deploy", "--prefect-file", "infra/prefect.yaml", "--all")
    # One run at a time, whichever deployment it is of: they share DVC's worktree.
    command = [PREFECT, "worker", "start", "--pool", "local", "--type", "process", "--limit", "1"]
    services.append(Service("prefect-worker", command))
    services[0].wait_until(f"{mlflow}/health")
    point = "" if prefect_port == 4200 else f"PREFECT_API_URL={prefect}/api "
    print(
        f"\nPrefect: {prefect}\nMLflow:  {mlflow}\n\nNow, in another terminal:\n"
        f"  {point}.venv/bin/prefect deployment run distill/koala-700m --watch\n",
        flush=True,
    )
    while True:
        time.sleep(1)
        for service in services:
            service.check()


def _close_lost_runs() -> None:
    """Close what was running when an earlier server was killed: it would hold its deployment's turn for ever."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    unfinished = FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=unfinished))):
            if run.deployment_id:  # and so of a worker that is gone; `make demo` may be running without one
                clean_up(str(run.id))
                client.set_flow_run_state(run.id, Crashed(message="The server stopped during the run."), force=True)


def _prefect(*arguments: str) -> None:
    """Run a command of Prefect's to its end. Raises NotServing."""
    with (HOME / "deploy.log").open("ab") as log:
        command = [PREFECT, "--no-prompt", *arguments]
        if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT).returncode:
            raise NotServing(f"prefect {' '.join(arguments)} failed: see {log.name}")


if __name__ == "__main__":
    sys.exit(main())
