"""Runs each measurement in a process of its own: a peak of memory, a compiler's cache and a failure are its alone.

The process is a module of koala.bench, told what to measure in JSON, and gives the figures as the last line of its output.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from koala.errors import KoalaError

Figures = dict[str, Any]
PLAIN = "plain"
"""The baseline's name."""

OUT_OF_MEMORY = {"out_of_memory": True}


def run(module: str, spec: dict[str, Any]) -> Figures:
    """Measure `spec` by koala.bench.`module` in a process of its own.

    Where that fails, what it said stands on stderr and the figures are `{"failed": status}`, so that the other measurements
    are not lost. Raises KoalaError for what the user can mend.
    """
    command = [sys.executable, "-m", f"koala.bench.{module}", json.dumps(spec)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode == -signal.SIGKILL:  # the system's way to say that there is no memory left
        return OUT_OF_MEMORY
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"failed": done.returncode}
    figures: Figures = json.loads(lines[-1])
    if complaint := figures.get("complaint"):
        raise KoalaError(complaint)
    return figures


def median(runs: Sequence[Figures], by: str) -> Figures:
    """Of several runs of one measurement the one whose figure `by` is the median, the lower of two; the last, if none has it."""
    measured = sorted((run for run in runs if by in run), key=lambda run: run[by])
    return measured[(len(measured) - 1) // 2] if measured else runs[-1]


def answer(measure: Callable[..., Figures]) -> None:
    """The process's side: measure what the command line says, and print the figures."""
    import torch

    from koala.console import hide_loading_bars

    hide_loading_bars()
    try:
        figures = measure(**json.loads(sys.argv[1]))
    except torch.OutOfMemoryError:
        figures = OUT_OF_MEMORY
    except KoalaError as error:
        figures = {"complaint": str(error)}
    print(json.dumps(figures))
