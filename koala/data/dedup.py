"""Duplicates among any number of samples: pairs from sorted hashes, groups from pairs.

Neither needs all samples in memory: DuckDB sorts on disk, and what is sorted is read as a stream.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

NEIGHBOURS = 32
"""Rows of an order that each row is compared with."""
BATCH = 1 << 16
"""Rows in memory at a time."""

Same = Callable[[slice, slice], np.ndarray]
"""Two equally long ranges of rows -> which rows of the first show the same picture as those of the second."""


def near_pairs(
    connection: "duckdb.DuckDBPyConnection", query: str, order: str, prepare: "Callable[[pa.Table], Same]"
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pairs of positions that show the same picture, among rows that are neighbours in an order.

    query: a SELECT with a column `position`. The time is that of sorting, whatever the rows: no two rows are compared for
    having a part of a hash in common, as most pictures on a white ground have.
    """
    import pyarrow as pa

    before: pa.Table | None = None
    for batch in batches(connection, f"{query} ORDER BY {order}, position"):
        rows = pa.Table.from_batches([batch])
        old = len(before) if before else 0
        table = pa.concat_tables([before, rows]) if before else rows
        positions, same = table["position"].to_numpy(), prepare(table)
        for step in range(1, min(NEIGHBOURS, len(table) - 1) + 1):
            # Each new row with the one `step` before it.
            right = slice(max(old, step), len(table))
            left = slice(right.start - step, right.stop - step)
            found = same(left, right)
            if found.any():
                yield positions[left][found], positions[right][found]
        before = table.slice(max(0, len(table) - NEIGHBOURS))


def batches(connection: "duckdb.DuckDBPyConnection", query: str) -> "Iterator[pa.RecordBatch]":
    """Yield a query's rows, `BATCH` at a time."""
    relation: Any = connection.sql(query)
    yield from relation.to_arrow_reader(BATCH)


def by_look(bits: int, difference: float) -> "Callable[[pa.Table], Same]":
    """Accept pairs whose `dhash` differs in at most `bits` bits, and whose `thumbnail` in at most `difference` on average."""

    def prepare(table: "pa.Table") -> Same:
        hashes = table["dhash"].to_numpy()
        pixels = matrix(table["thumbnail"], np.uint8).astype(np.int16)
        sums = table["brightness"].to_numpy().astype(np.int32)

        def same(left: slice, right: slice) -> np.ndarray:
            # Sums of values that differ little on average differ little: most pairs need no more than this.
            found: np.ndarray = np.abs(sums[left] - sums[right]) <= difference * pixels.shape[1]
            found &= np.bitwise_count(hashes[left] ^ hashes[right]) <= bits
            near = np.flatnonzero(found)
            found[near] = np.abs(pixels[left][near] - pixels[right][near]).mean(axis=1) <= difference
            return found

        return same

    return prepare


def by_embedding(cosine: float) -> "Callable[[pa.Table], Same]":
    """Accept pairs whose `embedding`, of unit length, has at least this cosine."""

    def prepare(table: "pa.Table") -> Same:
        vectors = matrix(table["embedding"], np.float16).astype(np.float32)

        def same(left: slice, right: slice) -> np.ndarray:
            found: np.ndarray = (vectors[left] * vectors[right]).sum(axis=1) >= cosine
            return found

        return same

    return prepare


def matrix(column: "pa.ChunkedArray", dtype: type[np.generic]) -> np.ndarray:
    """Return a column of equally long bytes as a matrix, with a row for each."""
    values = np.frombuffer(b"".join(column.to_pylist()), dtype)
    return values.reshape(len(column), -1)


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
