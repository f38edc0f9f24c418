"""Processes that are found, and ended, by a variable in their environment.

A signal to a parent, or to a process group, does not reach all of a stage: `dvc` leaves without telling its child, and
accelerate's ranks have sessions of their own. Whatever was started with the variable still carries it, wherever it is.
"""

import os
from collections.abc import Iterator
from contextlib import suppress

import psutil


def carrying(variable: str, value: str) -> list[psutil.Process]:
    """The running processes, this one apart, whose environment says `variable=value`."""
    return list(_carrying(variable, value))


def _carrying(variable: str, value: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(variable) == value:
                yield process


def end(variable: str, value: str, grace: float) -> None:
    """SIGTERM to all that carry `variable=value`, and SIGKILL to what is left after `grace` seconds."""
    asked = carrying(variable, value)
    for process in asked:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    try:
        psutil.wait_procs(asked, timeout=grace)
    finally:  # also when a second signal cuts the wait short
        while left := carrying(variable, value):
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=1)
