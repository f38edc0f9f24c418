"""Processes that a test has started, found by their working directory: its own folder."""

import os
import time
from collections.abc import Callable

import psutil


def mine(marks: str) -> list[psutil.Process]:
    """Processes that have `marks` (this test's folder) as their working directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == marks and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(true: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
