"""One stage, run by DVC as a process of its own: its lines as they come, and how it ended."""

import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.processes import end
from koala.tracking import FLOW_RUN, PARENT_RUN, close_runs

# A stage that trains saves what it has on SIGTERM. Prefect's worker kills a cancelled run 30 s after asking it to end.
GRACE_SECONDS = 20.0
# koala's exit status for an error that the user can mend: trying again would only give it again.
MENDABLE = 2

_COMMAND_FAILED = re.compile(r"ERROR: failed to reproduce .* exited with (-?\d+)")
# What DVC says after each stage of how to commit dvc.lock.
_GIT_ADVICE = re.compile(
    r"To (track the changes with git|enable auto staging), run:|\t(git add|dvc config)|Use `dvc push`"
)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. `status` is its command's exit status, negative where a signal ended it; DVC's own, where DVC failed.

    `complaint` is the line that says why, where it failed.
    """

    status: int
    complaint: str = ""

    @property
    def stopped(self) -> bool:
        """A signal ended it, which Python gives as a negative number and a shell as 128 and more."""
        return self.status < 0 or self.status - 128 in signal.valid_signals()

    @property
    def mendable(self) -> bool:
        return self.status == MENDABLE


def reproduce(stage: str, flow_run: str, parent_run: str, show: Callable[[str], None]) -> Outcome:
    """Bring one stage up to date: nothing if it is, its command if not. `show` gets each line of output at once.

    `flow_run` and `parent_run` reach the stage as KOALA_FLOW_RUN and KOALA_PARENT_RUN. Whatever interrupts this function
    (SIGTERM that became an exception, Ctrl-C) ends the stage and all its descendants before it goes on its way.
    """
    # Without --wait-for-lock, two flow runs in one worktree fail; without --single-item, each walks upstream again.
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage]
    # No session of its own: a signal to the worker's process group must reach it.
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_environment(flow_run, parent_run),
    ) as process:
        assert process.stdout is not None
        lines: deque[str] = deque(maxlen=100)  # the last ones: why it failed is among them
        try:
            for raw in process.stdout:
                # Of a line that was drawn over and over (a bar, with carriage returns) the last state is the news.
                line = raw.decode(errors="replace").rstrip().rsplit("\r", 1)[-1]
                if line and not _GIT_ADVICE.match(line):
                    show(line)
                    lines.append(line)
            status = process.wait()
        except BaseException:
            end(FLOW_RUN, flow_run, GRACE_SECONDS)
            raise
    return Outcome(status) if status == 0 else _failure(status, lines)


def clean_up(flow_run: str) -> None:
    """End what is left of a flow run that is over: its processes, and its runs in MLflow. A killed one cannot do it itself."""
    end(FLOW_RUN, flow_run, GRACE_SECONDS)
    close_runs(flow_run)


def _failure(dvc_status: int, lines: Sequence[str]) -> Outcome:
    """What the command said last, if it was the command that failed; else what DVC complained of."""
    for index, line in enumerate(lines):
        if match := _COMMAND_FAILED.match(line):
            return Outcome(int(match[1]), lines[index - 1] if index else line)
    complaints = [line for line in lines if line.startswith("ERROR: ")] or [*lines] or [f"dvc left with {dvc_status}"]
    return Outcome(dvc_status, complaints[-1])


def _environment(flow_run: str, parent_run: str) -> dict[str, str]:
    """This process's, with the two ids, with this Python's commands (`koala`) first, and with output that comes at once."""
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, PARENT_RUN: parent_run, FLOW_RUN: flow_run, "PATH": commands, "PYTHONUNBUFFERED": "1"}
