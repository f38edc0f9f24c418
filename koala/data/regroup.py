"""Rows that come in batches, cut anew: which rows are together does not depend on how they came."""

from collections.abc import Iterable, Iterator

import pyarrow as pa


def regrouped(tables: Iterable[pa.Table], rows: int, part_rows: int | None = None) -> Iterator[pa.Table]:
    """Yield the rows of `tables` in tables of `rows`; fewer are in the last one, and in the last of each `part_rows` rows."""
    waiting: list[pa.Table] = []
    have = given = 0
    for table in tables:
        waiting.append(table)
        have += len(table)
        while have >= (size := min(rows, part_rows - given % part_rows) if part_rows else rows):
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, size).combine_chunks()
            given, have = given + size, have - size
            waiting = [whole.slice(size)]
    if have:
        yield pa.concat_tables(waiting).combine_chunks()
