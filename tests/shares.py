"""Work for tests of koala.data.executor: it must stand where another process can import it."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from koala.data.executor import share
from koala.errors import KoalaError


def doubled(items: Sequence[int], rank: int) -> Iterator[int]:
    for item in items:
        yield item * 2


def double(item: int) -> int:
    return item * 2


def places(items: Sequence[int], rank: int) -> Iterator[tuple[int, int, int]]:
    for item in items:
        yield item, rank, os.getpid()


def refuses(items: Sequence[int], rank: int) -> Iterator[int]:
    for item in items:
        if item == 3:
            raise KoalaError("three is too many")
        yield item


def full(items: Sequence[int], rank: int) -> Iterator[int]:
    raise OSError(28, "No space left on device", "a file")
    yield


def dies(items: Sequence[int], rank: int) -> Iterator[int]:
    for item in items:
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item


def sleeps(items: Sequence[Path], rank: int) -> Iterator[Path]:
    for item in items:
        item.write_text(str(os.getpid()))
        time.sleep(600)
        yield item


if __name__ == "__main__":
    with share(sleeps, [Path(sys.argv[1], name) for name in "ab"], 2) as results:
        list(results)
