"""Work shared by processes: what they say arrives, and none is left behind."""

import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import shares

from koala.data.processes import share
from koala.errors import KoalaError


def test_each_item_is_worked_on_once_by_processes_of_their_own() -> None:
    found = list(share(shares.places, range(7), 3))
    assert sorted(item for item, _, _ in found) == list(range(7))
    assert {(item, rank) for item, rank, _ in found} == {(item, item % 3) for item in range(7)}
    assert len({process for _, _, process in found}) == 3
    assert not multiprocessing.active_children()


def test_no_items_start_nothing() -> None:
    assert list(share(shares.full, [], 2)) == []
    assert list(share(shares.doubled, [4], 2)) == [8]


def test_what_the_user_must_fix_arrives_as_it_was_raised() -> None:
    with pytest.raises(KoalaError, match=r"^three is too many$"):
        list(share(shares.refuses, range(6), 2))
    with pytest.raises(OSError, match="No space left on device") as raised:
        list(share(shares.full, range(6), 2))
    assert raised.value.errno == 28
    assert not multiprocessing.active_children()


def test_a_killed_process_is_said_and_ends_the_others() -> None:
    with pytest.raises(
        KoalaError, match=r"a process ended with status -9 before its work .*: run the same command again"
    ):
        list(share(shares.dies, range(6), 2))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_the_one_that_started_them(tmp_path: Path, end: int) -> None:
    parent = subprocess.Popen([sys.executable, shares.__file__, tmp_path])
    files = [tmp_path / "a", tmp_path / "b"]
    try:
        wait_until(lambda: all(file.is_file() and file.read_text() for file in files))
        workers = [psutil.Process(int(file.read_text())) for file in files]
    finally:
        parent.send_signal(end)
        parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    for worker in alive:
        worker.kill()
    assert alive == []


def wait_until(true, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
