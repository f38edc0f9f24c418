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
BATCH = 1 << 12
"""Rows in memory at a time."""

Prepare = Callable[["pa.Table"], np.ndarray]
"""Rows -> a vector for each, of unit length, n x d."""


def near_pairs(
    connection: "duckdb.DuckDBPyConnection", query: str, prepare: Prepare, least: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pairs of positions whose vectors have at least this cosine, among neighbours in the order of a hash.

    query: a SELECT of `position`, `key` (a hash of the vector by random planes) and what `prepare` needs. The time is that of
    sorting, whatever the rows: no two rows are compared for having a part of a hash in common, as most pictures on a white
    ground have.
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
        pairs = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        for step in range(1, min(NEIGHBOURS, len(table) - 1) + 1):
            # Each new row with the one `step` before it.
            right = np.arange(max(old, step), len(table))
            left = right - step
            likely = np.bitwise_count(keys[left] ^ keys[right]) <= limit
            left, right = left[likely], right[likely]
            found = (vectors[left] * vectors[right]).sum(axis=1) >= least
            pairs.append((positions[left[found]], positions[right[found]]))
        lefts, rights = (np.concatenate(side) for side in zip(*pairs, strict=True))
        if len(lefts):
            yield lefts, rights
        before = table.slice(max(0, len(table) - NEIGHBOURS))


def batches(connection: "duckdb.DuckDBPyConnection", query: str, rows: int = BATCH) -> "Iterator[pa.RecordBatch]":
    """Yield a query's rows, so many at a time."""
    relation: Any = connection.sql(query)
    yield from relation.to_arrow_reader(rows)


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
    """The images of one group, which chains of pairs join, told apart again: given one after the other, the best first."""

    def __init__(self) -> None:
        """Start without images."""
        self._heads: dict[object, int] = {}

    def head(self, position: int, names: Collection[object], like: Collection[object]) -> int:
        """Return the position of the first image that is the same picture, or the image's own.

        names: what no other picture has in common with it: its image's number, its URL. like: the names of the images that
        show the same picture.
        """
        if known := [self._heads[name] for name in (*names, *like) if name in self._heads]:
            return min(known)
        self._heads |= dict.fromkeys(names, position)
        return position
