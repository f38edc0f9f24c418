"""The stage `source`: the table of image URLs and captions to download.

`out` gets part-00000.parquet, part-00001.parquet, ... of a million rows each (url, caption: string; score columns: float64;
carried columns: string, int64 or float64), in the list's order, and stats.json (rows, and dropped rows by reason).
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from koala.console import say
from koala.data import manifest
from koala.data.config import SourceConfig
from koala.data.regroup import regrouped
from koala.errors import KoalaError
from koala.run import Run

if TYPE_CHECKING:
    from types import TracebackType

PART_ROWS = 1_000_000
"""Rows of a part."""
GROUP_ROWS = 50_000
"""Rows of a parquet row group."""


def source(config: SourceConfig, out: Path, run: Run) -> None:
    """Write the table that `config` describes. Raises KoalaError if the list cannot be read or has no usable row."""
    dropped: Counter[str] = Counter()
    rows = write_parts(config.tables(dropped), out)
    stats = {"rows": rows, "dropped": dict(sorted(dropped.items()))}
    if not rows:
        raise KoalaError(
            f"{config.location} holds no usable row (dropped: {stats['dropped']}): see source in params.yaml"
        )
    (out / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    manifest.write(out)
    run.metrics({"rows": rows} | {f"dropped.{reason}": count for reason, count in dropped.items()})
    run.artifact(out / "stats.json")
    say(f"source: {rows} rows, {dropped.total()} dropped")


def write_parts(tables: Iterable[pa.Table], folder: Path, part_rows: int = PART_ROWS) -> int:
    """Write tables to parts of `part_rows` rows in `folder`, in place of those that are there. Return the number of rows.

    The bytes depend on the rows alone, not on how they come in batches.
    """
    for old in folder.glob("part-*"):
        old.unlink()
    written = 0
    with _Parts(folder) as parts:
        for group in regrouped(tables, GROUP_ROWS, part_rows):
            parts.write(group, new=written % part_rows == 0)
            written += len(group)
    return written


class _Parts:
    """The part that is being written. It has its name once it is whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> "_Parts":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: "TracebackType | None") -> None:
        self._close(whole=kind is None)

    def write(self, group: pa.Table, new: bool) -> None:
        if new:
            self._close(whole=True)
            self._count += 1
        self._writer = self._writer or pq.ParquetWriter(self._file.with_suffix(".part"), group.schema)
        self._writer.write_table(group, row_group_size=len(group))

    @property
    def _file(self) -> Path:
        return self._folder / f"part-{self._count - 1:05d}.parquet"

    def _close(self, whole: bool) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        unfinished = self._file.with_suffix(".part")
        if whole:
            os.replace(unfinished, self._file)
        else:
            unfinished.unlink()
