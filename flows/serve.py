"""`make serve`: Prefect's server, a worker with all deployments, and MLflow's UI, on loopback, until Ctrl-C.

    python -m flows.serve [--prefect-port 4200] [--mlflow-port 5000]

Whatever ends this (Ctrl-C, SIGTERM, SIGKILL, a closed terminal, a service that dies) ends all of it, runs in progress
included.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from flows.services import HOME, PREFECT, Service, ServiceError, is_free, prefect_server
from flows.stages import PipelineError, profile
from koala.console import say, show
from koala.tracking import UI, experiment_page

BIN = Path(sys.executable).parent


def main() -> int:
    """Serve until told to stop. Exit status 2: the user must fix something."""
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description="Prefect and MLflow on loopback.")
    parser.add_argument("--prefect-port", type=int, default=4200)
    parser.add_argument("--mlflow-port", type=int, default=5000)
    ports = parser.parse_args()
    for name, port in vars(ports).items():
        if not is_free(port):
            flag = name.upper()
            say(f"serve: port {port} is in use: stop what uses it, or choose another (make serve {flag}=...)")
            return 2
    _on_signals(signal.default_int_handler)
    services: list[Service] = []
    status = 0
    try:
        _serve(services, ports.prefect_port, ports.mlflow_port)
    except KeyboardInterrupt:
        say("\nStopping; a stage that trains has 20 s to save its work.")
    except (ServiceError, PipelineError) as error:
        say(f"serve: {error}")
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


def _serve(services: list[Service], prefect_port: int, mlflow_port: int) -> None:
    """Start all services, each one put on the list, and watch them. Ends by an exception."""
    prefect = f"http://127.0.0.1:{prefect_port}"
    store = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    mlflow = store if store.startswith("http") else f"http://127.0.0.1:{mlflow_port}"
    HOME.mkdir(exist_ok=True)
    os.environ |= {
        "PREFECT_HOME": str(HOME.resolve()),
        "PREFECT_API_URL": f"{prefect}/api",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes that koala has no use for
        UI: mlflow,
    }
    # Only now, since Prefect reads its settings when it is imported.
    from flows import deployments, lost

    say(f"Starting Prefect and MLflow; their logs are in {HOME}/. Stop with Ctrl-C.")
    if mlflow != store:
        command = [str(BIN / "mlflow"), "server", "--backend-store-uri", store, "--host", "127.0.0.1", "--workers", "1"]
        services.append(Service("mlflow", [*command, "--port", str(mlflow_port)], log=HOME / "mlflow.log"))
    services.append(prefect_server(prefect_port))
    services[-1].wait_until(f"{prefect}/api/health")
    services[0].wait_until(f"{mlflow}/health")  # before this process opens the store, which the server creates
    lost.close_lost_runs("distill", no_worker=True)
    deployed = deployments.deploy()
    # One run at a time, whichever deployment it is of: they share DVC's worktree.
    command = [PREFECT, "worker", "start", "--pool", "local", "--type", "process", "--limit", "1"]
    services.append(Service("prefect-worker", command))
    point = "" if prefect_port == 4200 else f"PREFECT_API_URL={prefect}/api "
    show(
        f"\nPrefect: {prefect}/runs\nMLflow:  {experiment_page(f'koala-{profile()}')}\n\nNow, in another terminal:\n"
        f"  {point}.venv/bin/prefect deployment run distill/{deployed[0]} --watch\n"
    )
    while True:
        time.sleep(1)
        for service in services:
            service.check()


if __name__ == "__main__":
    sys.exit(main())
