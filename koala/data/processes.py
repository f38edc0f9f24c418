"""Work on shards shared by processes, which end with the one that started them, however that ends."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from koala.errors import KoalaError

T = TypeVar("T")
Work = Callable[[Sequence[T], int], Iterator[T]]
"""A function of items and the process's rank that yields each item once it has finished it. It can be pickled."""


def share(work: Work[T], items: Sequence[T], processes: int) -> Iterator[T]:
    """Yield each item once `work` has finished it: in this process, or in several, each of which takes every n-th item.

    Raises:
        KoalaError: `work` raised it, or a process ended before its work. What is finished stays.
    """
    processes = min(processes, len(items))
    if processes > 1:
        yield from _spread(work, items, processes)
    elif items:
        yield from work(items, 0)


def use_gpu(rank: int) -> None:
    """Make this process use a GPU of its own, where there are several."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())


def _spread(work: Work[T], items: Sequence[T], processes: int) -> Iterator[T]:
    context = multiprocessing.get_context("spawn")
    running: dict[Any, Any] = {}
    ready: Any
    try:
        for rank in range(processes):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(work, items[rank::processes], rank, sender), daemon=True)
            process.start()
            sender.close()  # its only holder is now the process: when that ends, the receiver sees it
            running[receiver] = process
        while running:
            for ready in wait(list(running)):
                try:
                    told = ready.recv()
                except EOFError:
                    process = running.pop(ready)
                    process.join()
                    if process.exitcode:
                        raise KoalaError(
                            f"a process ended with status {process.exitcode} before its work (-9: most often out of "
                            "memory; fewer processes take less): run the same command again; finished shards stay"
                        ) from None
                    continue
                if isinstance(told, Exception):
                    raise told
                yield told
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


def _run(work: Work[T], items: Sequence[T], rank: int, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for item in work(items, rank):
            sender.send(item)
    except (KoalaError, OSError) as error:
        sender.send(error)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
