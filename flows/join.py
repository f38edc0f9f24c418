"""A machine that joins a pool: what it needs is checked, in a line each, and its worker is started.

    python -m flows.join --pool gpu --server http://prefect.example.org:4200/api --machine gpu-24gb

Logins come from the environment alone: PREFECT_API_AUTH_STRING, MLFLOW_TRACKING_URI (with MLFLOW_TRACKING_USERNAME and
MLFLOW_TRACKING_PASSWORD), AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. The machine takes one stage at a time, each in a clone of
KOALA_REPOSITORY (left out: where this checkout came from), and keeps DVC's cache and unfinished work in `--folder`.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import prefect
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.services import HOME, PREFECT
from koala import tracking
from koala.console import say

REPOSITORY = "KOALA_REPOSITORY"
"""Environment variable with the repository that the machine clones."""
_NEEDS_GPU = "gpu"


class CheckError(Exception):
    """A machine lacks something. Its text is one line: what is wrong, and what to do."""


def server(url: str) -> str:
    """Check that Prefect's server answers, lets us in, and has our version."""
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        if error := client.api_healthcheck():
            raise CheckError(f"{url} does not answer ({type(error).__name__}): is it the address with /api at its end?")
        try:
            theirs = client.api_version()
        except Exception as error:
            raise CheckError(f"{url} refuses: set PREFECT_API_AUTH_STRING ({type(error).__name__})") from None
    if theirs.split(".")[:2] != prefect.__version__.split(".")[:2]:
        raise CheckError(
            f"{url} has Prefect {theirs}, this machine {prefect.__version__}: install the same requirements.lock"
        )
    return f"{url}, Prefect {theirs}"


def repository(address: str, folder: Path) -> str:
    """Check that the repository can be cloned: it is, into `folder`."""
    if re.match(r"\w+://[^/@]*:[^/@]*@", address):
        raise CheckError(f"{REPOSITORY} holds a password, which jobs would show: use git's credential store, or ssh")
    done = _run("git", "clone", "--quiet", "--depth=1", address, str(folder))
    if done.returncode:
        raise CheckError(f"{address} cannot be cloned: {_last_line(done.stderr)}")
    return f"{address} at {_run('git', '-C', str(folder), 'rev-parse', '--short', 'HEAD').stdout.strip()}"


def remote(clone: Path) -> str:
    """Check that DVC's default remote can be listed, written and read."""
    from dvc.config import NoRemoteError
    from dvc.repo import Repo

    with chdir(clone), Repo() as repo:
        try:
            store = repo.cloud.get_remote_odb()
        except NoRemoteError:
            raise CheckError(
                "the repository names no remote of DVC's: `dvc remote add -d NAME URL`, and commit it"
            ) from None
        probe = store.fs.join(store.path, f".joins-{os.getpid()}")
        store.fs.pipe_file(probe, b"a machine joins")
        if store.fs.cat_file(probe) != b"a machine joins":
            raise CheckError(f"{store.path} gives other bytes than were written")
        store.fs.remove(probe)
        return f"{store.fs.unstrip_protocol(store.path)} can be written and read"


def mlflow() -> str:
    """Check that the tracking store answers and lets us in."""
    if not (store := os.environ.get("MLFLOW_TRACKING_URI")):
        raise CheckError(
            "MLFLOW_TRACKING_URI is not set: name the team's server, such as http://mlflow.example.org:5000"
        )
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    tracking.experiment_page("koala")
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        del os.environ[name]
    return store


def gpu(pool: str) -> str:
    """Check that a machine of pool `gpu` has one."""
    if shutil.which("nvidia-smi") and not (listed := _run("nvidia-smi", "-L")).returncode:
        return "; ".join(line.partition(" (UUID")[0] for line in listed.stdout.splitlines())
    if pool == _NEEDS_GPU:
        raise CheckError("nvidia-smi shows no GPU: install the driver, or join pool cpu")
    return "none, and pool cpu needs none"


def disk(folder: Path, least: float) -> str:
    """Check that `folder` has `least` GB free."""
    free = shutil.disk_usage(folder).free / 1e9
    if free < least:
        raise CheckError(
            f"{folder} has {free:,.0f} GB free, and {least:,.0f} are asked for (--disk): free some, or name another --folder"
        )
    return f"{free:,.0f} GB free in {folder}"


def main() -> int:
    """Check all, and become the worker. Exit status 2: the machine lacks something."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.join", description="Check this machine, and join a pool with it."
    )
    parser.add_argument("--pool", required=True, help="a pool of dvc.yaml, such as cpu or gpu")
    parser.add_argument(
        "--server",
        default=os.environ.get("PREFECT_API_URL"),
        help="address of Prefect's API; left out: PREFECT_API_URL",
    )
    parser.add_argument("--machine", help="row of `machines` in params.yaml; left out: the one that params.yaml names")
    parser.add_argument(
        "--folder", type=Path, default=HOME / "machine", help="of DVC's cache, clones and unfinished work"
    )
    parser.add_argument(
        "--runs", type=Path, help="folder of unfinished work, on a disk that machines share; left out: in --folder"
    )
    parser.add_argument("--disk", type=float, default=50, help="GB that must be free in --folder")
    parser.add_argument("--check", action="store_true", help="only check")
    arguments = parser.parse_args()
    if not arguments.server:
        parser.error("name --server, or set PREFECT_API_URL")
    folder = arguments.folder.resolve()
    runs = (arguments.runs or folder / "runs").resolve()
    environment = _prepare(folder, runs, arguments.server, arguments.machine)
    os.environ |= environment
    if not _all_hold(arguments.pool, arguments.server, folder, arguments.disk):
        return 2
    if arguments.check:
        return 0
    command = [PREFECT, "worker", "start", "--pool", arguments.pool, "--type", "process", "--limit", "1"]
    if "PREFECT_WORKER_WEBSERVER_PORT" in os.environ:
        command.append("--with-healthcheck")
    os.execv(PREFECT, command)


def _prepare(folder: Path, runs: Path, url: str, machine: str | None) -> dict[str, str]:
    """Make the machine's folders. Return what its jobs need in their environment."""
    clones, settings = folder / "clones", folder / "dvc"
    for each in (clones, settings, runs):
        each.mkdir(parents=True, exist_ok=True)
    # One cache for all clones of the machine, on their file system: outs are links into it.
    (settings / "config").write_text(f"[cache]\n    dir = {folder / 'cache'}\n")
    environment = {
        "PREFECT_API_URL": url,
        "PREFECT_HOME": str(folder / "prefect"),
        "DVC_GLOBAL_CONFIG_DIR": str(settings),
        "KOALA_RUNS": str(runs),
        "TMPDIR": str(clones),
        REPOSITORY: os.environ.get(REPOSITORY) or _run("git", "remote", "get-url", "origin").stdout.strip(),
    }
    return environment | ({"KOALA_MACHINE": machine} if machine else {})


def _all_hold(pool: str, url: str, folder: Path, gigabytes: float) -> bool:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        clone = Path(scratch, "clone")
        checks: dict[str, Callable[[], str]] = {
            "server": lambda: server(url),
            "repository": lambda: repository(os.environ[REPOSITORY], clone),
            "remote": lambda: remote(clone),
            "MLflow": mlflow,
            "GPU": lambda: gpu(pool),
            "disk": lambda: disk(folder, gigabytes),
        }
        held = [_holds(name, check) for name, check in checks.items()]  # each says its line
        return all(held)


def _holds(name: str, check: Callable[[], str]) -> bool:
    try:
        say(f"join: {name}: {check()}")
    except CheckError as error:
        say(f"join: {name}: FAILED: {error}")
    except Exception as error:  # of a library: whatever it is, the machine cannot work
        say(f"join: {name}: FAILED: {_last_line(str(error)) or type(error).__name__}")
    else:
        return True
    return False


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


if __name__ == "__main__":
    sys.exit(main())
