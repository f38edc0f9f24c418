"""Processes of tests, forked from one that has imported what koala's processes import (warm.py)."""

import os
from functools import cache
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest.mock import patch


@cache
def forks() -> ForkServerContext:
    """Return the context whose processes are forked. There is one server a test process, started by the first call."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    with patch.dict(os.environ, {"PYTHONPATH": path}):  # the server does not take this process's sys.path
        forkserver.ensure_running()
    return context
