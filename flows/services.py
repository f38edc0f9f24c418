"""Servers and workers that run in the background while a command needs them."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil

from flows.processes import end, guarded, release

SERVICE = "KOALA_SERVICE"
"""Environment variable by which a service, and all that it starts, are found when it is time to end them."""
GRACE_SECONDS = 30.0
"""A cancelled run gives its stage 20 s to save its work, and then tells the server."""
START_SECONDS = 180.0

HOME = Path(".prefect")
"""Folder of Prefect's database and of the services' logs."""
PREFECT = str(Path(sys.executable).parent / "prefect")

_POLL_SECONDS = 0.1


class ServiceError(Exception):
    """A service that did not start, or that died. Its text is one line."""


class Service:
    """A program in the background.

    It has its own session, so that Ctrl-C reaches only its starter, which ends it. A guard ends it where its starter dies.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path | None = None) -> None:
        """Start `command`; its output goes to `log`, or to this program's own."""
        self.name = name
        self.log = log
        self.mark = f"{name}-{os.getpid()}"
        with contextlib.ExitStack() as files:
            output = files.enter_context(log.open("wb")) if log else None
            self.process = subprocess.Popen(
                guarded(command),
                env={**os.environ, SERVICE: self.mark},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
            )

    def wait_until(self, address: str) -> None:
        """Return when `address` answers. Raises ServiceError."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.check()
            with contextlib.suppress(URLError, TimeoutError, ConnectionError), urlopen(address, timeout=2):
                return
            time.sleep(_POLL_SECONDS)
        raise ServiceError(f"{self.name} does not answer at {address}{self._see()}")

    def check(self) -> None:
        """Raise ServiceError if the program has ended."""
        if (status := self.process.poll()) is not None:
            raise ServiceError(f"{self.name} ended with exit status {status}{self._see()}")

    def end(self) -> None:
        """End the program and all that it started: first its children, which may have something to say to it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            programs = psutil.Process(self.process.pid).children()  # of the guard
            children = [child for program in programs for child in program.children()]
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.terminate()
            psutil.wait_procs(children, timeout=GRACE_SECONDS)
        release(self.process)
        end(SERVICE, self.mark, GRACE_SECONDS)

    def _see(self) -> str:
        return f": see {self.log}" if self.log else ""


def prefect_server(port: int) -> Service:
    """Start Prefect's server on loopback. Its log is .prefect/server.log."""
    HOME.mkdir(exist_ok=True)
    command = [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    return Service("prefect-server", command, log=HOME / "server.log")


def free_port() -> int:
    """Return a port of loopback that the system finds free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    """Return whether nothing listens at a port of loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
