"""One stage, run by DVC in a separate process: its lines as they come, and how it ended."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.processes import GRACE_SECONDS, end, guarded, release
from flows.stages import LOCK, pipeline
from koala.tracking import FLOW_RUN, PARENT_RUN, close_runs

FIXABLE = 2
"""koala's exit status for an error that the user can fix: a retry would only give it again."""

PUSH_PAUSES = (10.0, 30.0, 60.0)
"""Seconds before a failed push is tried again. Until it succeeds, what a stage made lies on this machine only."""

_COMMAND_FAILED = re.compile(r"ERROR: failed to reproduce .* exited with (-?\d+)")
# DVC's advice, after each stage, on how to commit dvc.lock.
_GIT_ADVICE = re.compile(
    r"To (track the changes with git|enable auto staging), run:|\t(git add|dvc config)|Use `dvc push`"
)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended."""

    status: int
    """Its command's exit status, negative where a signal ended it; DVC's own, where DVC failed."""
    complaint: str = ""
    """The line that says why it failed."""

    @property
    def stopped(self) -> bool:
        """Whether a signal ended it, which Python gives as a negative number and a shell as 128 and more."""
        return self.status < 0 or self.status - 128 in signal.valid_signals()

    @property
    def fixable(self) -> bool:
        """Whether the user must fix something before a retry can help."""
        return self.status == FIXABLE


def reproduce(stage: str, flow_run: str, parent_run: str, show: Callable[[str], None]) -> Outcome:
    """Run one stage unless it is up to date. `show` gets each line of output at once.

    `flow_run` and `parent_run` reach the stage as KOALA_FLOW_RUN and KOALA_PARENT_RUN. Whatever interrupts this function
    (SIGTERM that became an exception, Ctrl-C) ends the stage and all its descendants first. SIGKILL of this process
    ends them too.
    """
    # Without --single-item, each of several flow runs in one worktree walks upstream again.
    return _dvc(["repro", "--single-item", stage], flow_run, parent_run, show)


def reproduce_in_clone(stage: str, flow_run: str, parent_run: str, show: Callable[[str], None]) -> Outcome:
    """Run one stage in a fresh clone, unless some machine has computed it: then restore it from the remote's run cache.

    What it makes is pushed. Of what other stages made, only what this one reads is fetched, where dvc.lock names it. The
    arguments are those of `reproduce`.
    """

    def dvc(*arguments: str) -> Outcome:
        return _dvc(arguments, flow_run, parent_run, show)

    # With --allow-missing, DVC says "didn't change" of a stage that never ran where what it reads is missing. So that comes first.
    # And never --single-item: it would say the same, or restore what an old dvc.lock names.
    reads = [name for name in pipeline(stage)[-1].upstream if name in _locked()]
    if reads and (outcome := dvc("pull", *reads)).status:
        return outcome
    if (outcome := dvc("repro", "--pull", "--allow-missing", stage)).status:
        return outcome
    if stage not in _locked():
        return Outcome(1, f"DVC neither ran nor restored {stage}")
    for pause in PUSH_PAUSES:
        outcome = dvc("push", "--run-cache", "--with-deps", stage)
        if outcome.status == 0 or outcome.stopped:
            return outcome
        show(f"{stage} is not pushed: again in {pause:.0f} s")
        time.sleep(pause)
    return dvc("push", "--run-cache", "--with-deps", stage)


def _locked() -> dict[str, Any]:
    """Return the stages that dvc.lock knows."""
    stages: dict[str, Any] = yaml.safe_load(LOCK.read_text())["stages"] if LOCK.is_file() else {}
    return stages


def pull(stage: str, flow_run: str, show: Callable[[str], None]) -> Outcome:
    """Fetch what a stage made, as dvc.lock names it, from the remote."""
    return _dvc(["pull", stage], flow_run, "", show)


def _dvc(arguments: Sequence[str], flow_run: str, parent_run: str, show: Callable[[str], None]) -> Outcome:
    _drop_torn_locks()
    # Without --wait-for-lock, two flow runs in one worktree fail.
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]
    # No separate session: a signal to the worker's process group must reach it.
    with subprocess.Popen(
        guarded(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_environment(flow_run, parent_run),
    ) as process:
        assert process.stdout is not None
        lines: deque[str] = deque(maxlen=100)  # the last ones: why it failed is among them
        try:
            for raw in process.stdout:
                # A progress bar redraws its line with `\r`: keep only the last state.
                line = raw.decode(errors="replace").rstrip().rsplit("\r", 1)[-1]
                if line and not _GIT_ADVICE.match(line):
                    show(line)
                    lines.append(line)
            status = process.wait()
        except BaseException:
            try:
                release(process)
            finally:  # what the guard no longer saw, and also when a second signal interrupts it
                end(FLOW_RUN, flow_run, GRACE_SECONDS)
            raise
    return Outcome(status) if status == 0 else _failure(status, lines)


def _drop_torn_locks() -> None:
    """Remove DVC's list of locked paths where a process was killed while it wrote it: DVC would refuse all work."""
    from dvc.lock import make_lock

    folder = Path(".dvc", "tmp")
    locks = folder / "rwlock"
    if not locks.is_file():
        return
    with make_lock(str(folder / "rwlock.lock"), tmp_dir=str(folder), wait=True):  # nobody is writing it now
        try:
            json.loads(locks.read_bytes())
        except ValueError:
            locks.unlink(missing_ok=True)


def clean_up(flow_run: str) -> None:
    """End what a flow run that is over has left: its processes, and its runs in MLflow. A killed one cannot do so itself."""
    end(FLOW_RUN, flow_run, GRACE_SECONDS)
    close_runs(flow_run)


def _failure(dvc_status: int, lines: Sequence[str]) -> Outcome:
    """Return the command's last line if the command failed, and DVC's complaint if DVC did."""
    for index, line in enumerate(lines):
        if match := _COMMAND_FAILED.match(line):
            return Outcome(int(match[1]), lines[index - 1] if index else line)
    complaints = [line for line in lines if line.startswith("ERROR: ")] or [*lines] or [f"dvc exited with {dvc_status}"]
    return Outcome(dvc_status, complaints[-1])


def _environment(flow_run: str, parent_run: str) -> dict[str, str]:
    """Return this process's environment with the two ids, and unbuffered output.

    This Python's commands (`koala`) come first, and this checkout's modules: a clone's are not those that are installed.
    """
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    modules = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    ids = {PARENT_RUN: parent_run, FLOW_RUN: flow_run}
    return {**os.environ, **ids, "PATH": commands, "PYTHONPATH": modules, "PYTHONUNBUFFERED": "1"}
