"""Child processes that never outlive their parent.

    with guarded(["koala", "serve-shapes"], log) as process:
        ...                                       # the command runs
                                                  # the command and its descendants have ended

A guard process (`python -m koala.process COMMAND...`) runs between parent and command. It holds the read end of a pipe
from the parent. The pipe closes when the block ends, and also when the parent dies, even by SIGKILL. The guard then ends
the command and its descendants. No process leaves its process group.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from koala.errors import KoalaError

POLL_SECONDS = 0.25
GRACE_SECONDS = 3.0
"""Time between SIGTERM and SIGKILL."""


@contextmanager
def guarded(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` inside the block, with its output in `log`. Programs next to this Python are found first.

    Yields the guard process, which ends with the command and has its exit status.
    Raises KoalaError if there is no such command.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    program = shutil.which(command[0], path=path)
    if program is None:
        raise KoalaError(f"there is no command {command[0]!r}: install it, or change the command in params.yaml")
    with log.open("wb") as output:
        guard = subprocess.Popen(
            [sys.executable, "-m", "koala.process", program, *command[1:]],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {}), "PATH": path},
        )
    try:
        yield guard
    finally:
        assert guard.stdin is not None
        guard.stdin.close()
        guard.wait()


def last_line(log: Path) -> str:
    """Return the last non-empty line of a log, without control characters, cut to 300 characters."""
    lines = (
        [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    )
    text = lines[-1] if lines else "(no output)"
    return "".join(character for character in text if character.isprintable())[:300]


def main(command: list[str]) -> int:
    """Run `command` until it ends or stdin closes, then end what is left of it. Return its exit status."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    family: set[psutil.Process] = set()
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        while process.poll() is None and not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
            # Remember descendants: a child whose parent has died can no longer be found through it.
            family = {member for member in family if member.is_running()} | _children()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        _end(family | _children())
    return process.wait()


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _end(processes: set[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    while (alive := [process for process in processes if _alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _alive(process: psutil.Process) -> bool:
    """Return whether a process runs. A zombie does not: in a container, no one may ever reap it."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
