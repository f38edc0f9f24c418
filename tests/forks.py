"""Processes of tests, forked from one that has imported what koala's processes import (warm.py)."""

import os
import tempfile
from contextlib import ExitStack
from functools import cache
from multiprocessing import forkserver, get_context, spawn
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest.mock import patch

from preloaded import preloaded

SHARED = "KOALA_TEST_PROGRAMS"
"""Variable with the folder of programs that a process above this one provides."""

_until_the_end = ExitStack()


@cache
def programs() -> Path:
    """Return the folder of programs of tests/preloaded.py; their server is started by the first call, if none is shared."""
    if shared := os.environ.get(SHARED):
        return Path(shared)
    folder = _until_the_end.enter_context(tempfile.TemporaryDirectory(prefix="koala-programs-"))
    return _until_the_end.enter_context(preloaded(Path(folder)))


@cache
def forks() -> ForkServerContext:
    """Return the context whose processes are forked. Its server is itself forked, from that of `programs`."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    real = spawn.get_executable()
    spawn.set_executable(str(programs() / "python"))
    with patch.dict(os.environ, {"PYTHONPATH": path}):  # the server does not take this process's sys.path
        forkserver.ensure_running()
    spawn.set_executable(real)
    return context


def end() -> None:
    """End the servers, and all that was forked from them."""
    _until_the_end.close()
