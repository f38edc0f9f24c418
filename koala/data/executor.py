"""Work on shards, shared by processes of this machine, or by the machines of a Ray cluster.

    with share(work, shards, processes=8, engine="processes") as results:
        for result in results: ...

The processes of this machine end with the one that started them, however that ends. A cluster must be there already, its
machines on one file system: koala starts no server.
"""

import errno
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, TypeVar

from koala.config import Config
from koala.disk import fills_disk
from koala.errors import KoalaError, line_of

T = TypeVar("T")
R = TypeVar("R")
Work = Callable[[Sequence[T], int], Iterator[R]]
"""A function of items and the process's rank that yields results as it has them. It can be pickled."""
Engine = Literal["processes", "ray"]


class SharedWork(Config):
    """Where a stage's processes run. It changes only the speed."""

    engine: Engine = "processes"
    """`processes`: on this machine. `ray`: on the Ray cluster that RAY_ADDRESS names, or this machine's own; its machines
    share this file system."""


@contextmanager
def share(work: Work[T, R], items: Sequence[T], processes: int, engine: Engine = "processes") -> Iterator[Iterator[R]]:
    """Provide what `work` yields of the items: in this process, or in several, each of which takes every n-th item.

    Raises:
        KoalaError: `work` raised it, a process ended before its work, or there is no cluster. What is finished stays.
    """
    processes = min(processes, len(items))
    if not items:
        yield iter(())
    elif engine == "ray":
        yield _on_ray(work, items, processes)
    elif processes == 1:
        yield work(items, 0)
    else:
        running: dict[Any, Any] = {}
        try:
            yield _spread(work, items, processes, running)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.join()


def each(function: Callable[[T], R], items: Sequence[T], processes: int, engine: Engine = "processes") -> Any:
    """Provide what `function` returns for each item, as `share` does."""
    return share(partial(_apply, function), items, processes, engine)


def use_gpu(rank: int) -> None:
    """Make this process use a GPU of its own, where there are several."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())


def _apply(function: Callable[[T], R], items: Sequence[T], rank: int) -> Iterator[R]:
    for item in items:
        yield function(item)


def _spread(work: Work[T, R], items: Sequence[T], processes: int, running: dict[Any, Any]) -> Iterator[R]:
    """Start processes, yield what they find; `running` holds those that run."""
    context = multiprocessing.get_context("spawn")
    ready: Any
    for rank in range(processes):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(work, items[rank::processes], rank, sender))
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


def _run(work: Work[T, R], items: Sequence[T], rank: int, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for result in work(items, rank):
            sender.send(result)
    except (KoalaError, OSError) as error:
        sender.send(error)
    except Exception as error:
        if not fills_disk(error):
            raise
        sender.send(OSError(errno.ENOSPC, line_of(error)))  # libraries' own errors need not survive a pipe


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


# A Ray cluster.


def _on_ray(work: Work[T, R], items: Sequence[T], processes: int) -> Iterator[R]:
    ray = cluster()
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    # A part that fails is not tried again by Ray: the stage, run again, resumes it.
    part = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, num_returns="streaming")(_part)
    parts = [part.remote(work, items[rank::processes], rank) for rank in range(processes)]
    try:
        while parts:
            (ready, *_), _ = ray.wait(parts, num_returns=1)
            try:
                yield ray.get(next(ready))
            except StopIteration:
                parts.remove(ready)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise KoalaError(
            f"a part of the work was lost on the cluster ({line_of(error)}): run the same command again; finished shards stay"
        ) from None
    finally:
        for each_part in parts:
            ray.cancel(each_part, force=True)


def _part(work: Work[T, R], items: Sequence[T], rank: int) -> Iterator[R]:
    for result in work(items, rank):  # noqa: UP028 (Ray sends into its generator: a delegated one need not take that)
        yield result


def cluster() -> Any:
    """Return the module `ray`, connected to the cluster. Raises KoalaError where either is missing."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError:
        raise KoalaError("engine ray needs Ray: pip install 'koala-distill[ray]'") from None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS") or "auto"
        host, _, port = address.rpartition(":")
        try:
            if "/" not in host and port.isdigit():
                socket.create_connection((host, int(port)), 5).close()  # Ray itself tries for minutes
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except OSError:  # of which ConnectionError is one
            raise KoalaError(
                "there is no Ray cluster: set RAY_ADDRESS, start one (`ray start --head`), or take `engine: processes`"
            ) from None
    return ray
