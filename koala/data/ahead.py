"""Batches whose preparation is started ahead of their use."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
Started = TypeVar("Started")

_AHEAD = 2  # batches


def batches_ahead(items: Iterator[T], size: int, start: Callable[[Sequence[T]], Started]) -> Iterator[Started]:
    """Yield `start` of each batch of items; that of the next two has been called. It returns at once, its work done by threads."""
    waiting: deque[Started] = deque()
    while batch := list(islice(items, size)):
        waiting.append(start(batch))
        if len(waiting) > _AHEAD:
            yield waiting.popleft()
    yield from waiting
