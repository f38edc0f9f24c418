"""Runs a command that must not outlive the one who started it.

    with guarded(["koala", "serve-shapes"], log) as process:
        ...                                       # the command runs
                                                  # here it is gone, with all that it started

Between the two stands a process of this module (`python -m koala.data.guard COMMAND...`) that holds the reading end of
a pipe. The pipe closes when the block ends, and also when the starter dies, by whatever signal: the guard then ends the
command and its descendants. So nothing is left behind after SIGTERM, nor after SIGKILL, and no process leaves its
group.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from koala.errors import KoalaError

POLL_SECONDS = 0.25
GRACE_SECONDS = 3.0


@contextmanager
def guarded(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen]:
    """Run `command` inside the block, its output in `log`. Programs beside this Python are found first.

    Yields the guard's process: it ends when the command does, with its exit status.
    Raises KoalaError where there is no such command.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    program = shutil.which(command[0], path=path)
    if program is None:
        raise KoalaError(f"there is no command {command[0]!r}: install it, or change the command in params.yaml")
    with log.open("wb") as output:
        guard = subprocess.Popen(
            [sys.executable, "-m", "koala.data.guard", program, *command[1:]],
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
    """The last line of a log that says something, without what a terminal would obey; at most 300 characters."""
    lines = (
        [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    )
    text = lines[-1] if lines else "it said nothing"
    return "".join(character for character in text if character.isprintable())[:300]


def main(command: list[str]) -> int:
    """Run `command` until it ends or stdin is closed; then end whatever of it is left. Returns its exit status."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    family: set[psutil.Process] = set()
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        while process.poll() is None and not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
            # Remembered, since children whose parent has died can no longer be found through it.
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
    _, alive = psutil.wait_procs(processes, timeout=GRACE_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
