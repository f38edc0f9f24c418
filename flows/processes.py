"""Child processes: found and ended by a variable in their environment, and never outliving the one who started them.

A signal to a parent, or to a process group, does not reach all of a stage: `dvc` exits without passing it to its child,
and accelerate's ranks have their own sessions. Whatever was started with the variable still carries it, wherever it is.

After SIGKILL nobody is left to look for them. So a command runs under a guard, which ends it when its starter dies:

    python -m flows.processes PROGRAM ARGUMENTS...
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import psutil

from koala import process as watch

GRACE_SECONDS = 20.0
"""Time between SIGTERM and SIGKILL: a stage that trains saves its work. Prefect's worker kills a cancelled run after 30 s."""

_POLL_SECONDS = 0.1


def guarded(command: Sequence[str]) -> list[str]:
    """Return `command` under a guard. Start it with a pipe as stdin: when the pipe closes, the command is ended."""
    return [sys.executable, "-m", "flows.processes", *command]


def release(guard: subprocess.Popen[Any]) -> None:
    """Have a guard end its command: SIGTERM once to each process of it, and SIGKILL after `GRACE_SECONDS`."""
    assert guard.stdin
    guard.stdin.close()
    guard.wait()


def carrying(variable: str, value: str) -> list[psutil.Process]:
    """Return the running processes, without this one, whose environment says `variable=value`."""
    return list(_carrying(variable, value))


def _carrying(variable: str, value: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(variable) == value:
                yield process


def end(variable: str, value: str, grace: float) -> None:
    """Send SIGTERM to all that carry `variable=value`, and SIGKILL to what is left after `grace` seconds."""
    for process in carrying(variable, value):
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    try:
        _wait_until_gone(variable, value, grace)
    finally:  # also when a second signal interrupts the wait
        while left := carrying(variable, value):
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            _wait_until_gone(variable, value, 1)


def _wait_until_gone(variable: str, value: str, seconds: float) -> None:
    """Wait for processes by their environment, which a zombie has none of: in a container nobody may ever reap it."""
    deadline = time.monotonic() + seconds
    while carrying(variable, value) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def main(command: list[str]) -> int:
    """Run `command` until it ends or stdin is closed. Return its exit status, 128 and more where a signal ended it."""
    watch.GRACE_SECONDS = GRACE_SECONDS
    status = watch.main(command)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
