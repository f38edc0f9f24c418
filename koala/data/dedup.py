"""Duplicates among any number of samples: pairs from sorted hashes, groups from pairs.

Neither needs all samples in memory: DuckDB sorts on disk, and what is sorted is read as a stream.
"""

import math
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

NEIGHBOURS = 32
"""Rows of an order that each row is compared with."""
BATCH = 1 << 14
"""Rows in memory at a time."""

Prepare = Callable[["pa.Table"], np.ndarray]
"""Rows -> a vector for each, of unit length, n x d."""


def near_pairs(
    connection: "duckdb.DuckDBPyConnection", query: str, prepare: Prepare, least: float, bits: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pairs of positions whose vectors have at least this cosine, among neighbours in the order of a hash.

    query: a SELECT of `position`, `key` (a hash of the vector by random planes) and, where `bits` limits in how many bits those
    of a pair may differ, `dhash`. The time is that of sorting, whatever the rows: no two rows are compared for having a part of
    a hash in common, as most pictures on a white ground have.
    """
    import pyarrow as pa

    share = math.acos(least) / math.pi
    limit = 64 * share + 5 * math.sqrt(
        64 * share * (1 - share)
    )  # bits in which keys of a pair differ, and five deviations
    before: pa.Table | None = None
    for batch in batches(connection, f"{query} ORDER BY key, position"):
        rows = pa.Table.from_batches([batch])
        old = len(before) if before else 0
        table = pa.concat_tables([before, rows]) if before else rows
        positions, keys, vectors = table["position"].to_numpy(), table["key"].to_numpy(), prepare(table)
        hashes = table["dhash"].to_numpy() if bits is not None else None
        for step in range(1, min(NEIGHBOURS, len(table) - 1) + 1):
            # Each new row with the one `step` before it.
            right = np.arange(max(old, step), len(table))
            left = right - step
            likely = np.bitwise_count(keys[left] ^ keys[right]) <= limit
            if hashes is not None:
                likely &= np.bitwise_count(hashes[left] ^ hashes[right]) <= bits
            left, right = left[likely], right[likely]
            found = (vectors[left] * vectors[right]).sum(axis=1) >= least
            if found.any():
                yield positions[left[found]], positions[right[found]]
        before = table.slice(max(0, len(table) - NEIGHBOURS))


def batches(connection: "duckdb.DuckDBPyConnection", query: str) -> "Iterator[pa.RecordBatch]":
    """Yield a query's rows, `BATCH` at a time."""
    relation: Any = connection.sql(query)
    yield from relation.to_arrow_reader(BATCH)


def matrix(column: "pa.ChunkedArray", dtype: type[np.generic]) -> np.ndarray:
    """Return a column of equally long bytes as a matrix of float32, with a row for each."""
    values = np.frombuffer(b"".join(column.to_pylist()), dtype)
    return values.reshape(len(column), -1).astype(np.float32)


class Groups:
    """Positions joined by pairs: two are in one group if a chain of pairs leads from one to the other.

    Memory grows with the positions that have a pair, not with all.
    """

    _WAITING = 1 << 20

    def __init__(self) -> None:
        """Start without pairs."""
        self._pairs: list[np.ndarray] = []
        self._waiting = 0

    def add(self, left: np.ndarray, right: np.ndarray) -> None:
        """Add pairs: two arrays of positions."""
        self._pairs.append(np.stack([left, right], axis=1).astype(np.int64))
        self._waiting += len(left)
        if self._waiting > self._WAITING:
            members, first = self._joined()
            self._pairs, self._waiting = [np.stack([members, members[first]], axis=1)], 0

    def members(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions in ascending order, and the group of each: 0, 1, ... in the order of their first members."""
        members, first = self._joined()
        return members, np.unique(first, return_inverse=True)[1].astype(np.int64)

    def _joined(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions in ascending order, and the index of the first member of each one's group."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        pairs = np.concatenate([np.empty((0, 2), np.int64), *self._pairs])
        members, index = np.unique(pairs, return_inverse=True)
        index = index.reshape(-1, 2)
        graph = coo_array((np.ones(len(pairs), bool), (index[:, 0], index[:, 1])), shape=(len(members),) * 2)
        _, label = connected_components(graph, directed=False)
        _, first, group = np.unique(label, return_index=True, return_inverse=True)
        return members, first[group]


class Chain:
    """The images of one group, which chains of pairs join, told apart again: given one after the other, the best first.

    Memory grows with the names of the images that are like none before them. Of their looks the last `ROOM` are compared.
    """

    def __init__(self, thumbnail: float, cosine: float | None) -> None:
        """Take the least correlation of thumbnails, and the least cosine of embeddings, of the same picture."""
        self._names: dict[object, int] = {}
        self._looks = _Heads(thumbnail)
        self._embeddings = _Heads(2.0 if cosine is None else cosine)

    def head(self, position: int, names: Collection[object], look: np.ndarray, embedding: np.ndarray | None) -> int:
        """Return the position of the first image that is the same picture, or the image's own.

        names: what no other picture has in common with it: its hash, its URL. look: its thumbnail's pattern.
        """
        if known := [self._names[name] for name in names if name in self._names]:
            return min(known)
        vectors = [(self._looks, look), *([(self._embeddings, embedding)] if embedding is not None else [])]
        for heads, vector in vectors:
            if (like := heads.like(vector)) is not None:
                return like
        for heads, vector in vectors:
            heads.add(position, vector)
        self._names |= dict.fromkeys(names, position)
        return position


ROOM = 4096
"""Images of one group that each further one is compared with."""


class _Heads:
    """Images by a vector, the last `ROOM` of them."""

    def __init__(self, least: float) -> None:
        self._least = least
        self._count = 0
        self._positions = np.empty(8, np.int64)
        self._vectors = np.empty((8, 0), np.float32)

    def like(self, vector: np.ndarray) -> int | None:
        """Return the position of an image with at least this cosine."""
        there = min(self._count, ROOM)
        if not there:
            return None
        found = np.flatnonzero(self._vectors[:there] @ vector >= self._least)
        return int(self._positions[found[0]]) if found.size else None

    def add(self, position: int, vector: np.ndarray) -> None:
        size = len(self._positions)
        if not self._count:
            self._vectors = np.empty((size, len(vector)), np.float32)
        elif self._count == size < ROOM:
            self._positions = np.concatenate([self._positions, np.empty(size, np.int64)])
            self._vectors = np.concatenate([self._vectors, np.empty((size, len(vector)), np.float32)])
        place = self._count % ROOM
        self._positions[place], self._vectors[place] = position, vector
        self._count += 1
