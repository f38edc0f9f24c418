"""Work shared by processes, here or on a Ray cluster: what they find arrives, and none is left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import shares
from data.processes import wait_until

from koala.data import executor
from koala.data.executor import Engine
from koala.errors import KoalaError


def share(work: Callable[..., Any], items: Sequence[Any], processes: int, engine: Engine = "processes") -> list[Any]:
    with executor.share(work, items, processes, engine) as results:
        return list(results)


@pytest.fixture(params=["processes", "ray"])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param == "ray":
        request.getfixturevalue("cluster")
    found: Engine = request.param
    return found


def test_each_item_is_worked_on_once_by_processes_of_their_own(engine: Engine) -> None:
    found = share(shares.places, range(7), 3, engine)
    assert sorted(item for item, _, _ in found) == list(range(7))
    assert {(item, rank) for item, rank, _ in found} == {(item, item % 3) for item in range(7)}
    processes = {process for _, _, process in found}
    assert os.getpid() not in processes
    assert len(processes) == 3 or engine == "ray"  # whose processes may take a part each after another
    assert not multiprocessing.active_children()


def test_no_items_start_nothing() -> None:
    assert share(shares.full, [], 2) == []
    assert share(shares.full, [], 2, "ray") == []
    assert share(shares.doubled, [4], 2) == [8]


def test_a_function_of_one_item(engine: Engine) -> None:
    with executor.each(shares.double, [1, 2, 3], 2, engine) as results:
        assert sorted(results) == [2, 4, 6]


def test_what_the_user_must_fix_arrives_as_it_was_raised(engine: Engine) -> None:
    with pytest.raises(KoalaError, match=r"^three is too many$"):
        share(shares.refuses, range(6), 2, engine)
    with pytest.raises(OSError, match="No space left on device") as raised:
        share(shares.full, range(6), 2, engine)
    assert raised.value.errno == 28
    assert not multiprocessing.active_children()


def test_a_killed_process_is_said_and_ends_the_others(engine: Engine) -> None:
    lost = {"processes": r"a process ended with status -9 before its work", "ray": "a part of the work was lost"}
    with pytest.raises(KoalaError, match=f"{lost[engine]} .*: run the same command again; finished shards stay"):
        share(shares.dies, range(6), 2, engine)
    assert not multiprocessing.active_children()


def test_what_is_not_asked_for_any_more_ends() -> None:
    with executor.share(shares.places, range(100), 2) as results:
        next(results)
        assert multiprocessing.active_children()
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("forked")
def test_without_a_cluster_it_is_one_line(tmp_path: Path) -> None:
    code = "from koala.data.executor import share\nwith share(len, [1], 1, 'ray') as results: list(results)"
    environment = {"PATH": "/usr/bin", "HOME": str(tmp_path), "RAY_ADDRESS": "127.0.0.1:9", "RAY_TMPDIR": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "KoalaError: there is no Ray cluster: set RAY_ADDRESS, start one (`ray start --head`)" in said.stderr


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
