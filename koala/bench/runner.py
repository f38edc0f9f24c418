"""Measurements in separate processes, so that a peak of memory, a compiler's cache and a failure concern only one.

A process is a module of koala.bench. It reads what to measure as JSON and writes the figures as its last line.
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
    """Measure `spec` by koala.bench.`module` in a separate process.

    Where that fails, its stderr is shown and the figures are `{"failed": status}`, so that the other measurements are
    not lost. Raises KoalaError for what the user can fix.
    """
    command = [sys.executable, "-m", f"koala.bench.{module}", json.dumps(spec)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode == -signal.SIGKILL:  # how the system says that no memory is left
        return OUT_OF_MEMORY
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"failed": done.returncode}
    figures: Figures = json.loads(lines[-1])
    if complaint := figures.get("complaint"):
        raise KoalaError(complaint)
    return figures


def median(runs: Sequence[Figures], by: str) -> Figures:
    """Return the run with the median `by` (the lower one for an even count), or the last run if none has it."""
    measured = sorted((run for run in runs if by in run), key=lambda run: run[by])
    return measured[(len(measured) - 1) // 2] if measured else runs[-1]


def answer(measure: Callable[..., Figures]) -> None:
    """Measure what the command line says, and write the figures: the process's side of `run`."""
    import torch

    from koala.console import hide_loading_bars, show

    hide_loading_bars()
    try:
        figures = measure(**json.loads(sys.argv[1]))
    except torch.OutOfMemoryError:
        figures = OUT_OF_MEMORY
    except KoalaError as error:
        figures = {"complaint": str(error)}
    show(json.dumps(figures))
