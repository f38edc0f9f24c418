"""The stage `source`: the table of image URLs and captions to download.

`out` gets table.parquet (url, caption: string; score columns: float64) and stats.json (rows, and dropped rows by reason).
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from koala.console import say
from koala.data import manifest
from koala.data.config import SourceConfig
from koala.errors import KoalaError
from koala.run import Run

if TYPE_CHECKING:
    import pyarrow as pa


def source(config: SourceConfig, out: Path, run: Run) -> None:
    """Write the table that `config` describes. Raises KoalaError if the list cannot be read or has no usable row."""
    dropped: Counter[str] = Counter()
    rows = write_table(config.tables(dropped), out / "table.parquet", config.rows)
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


def write_table(tables: "Iterable[pa.Table]", path: Path, limit: int | None) -> int:
    """Write the first `limit` rows of `tables` (all of them if None) to one parquet file. Return the number of rows."""
    written = 0
    writer = None
    unfinished = path.with_suffix(".part")
    try:
        for table in tables:
            part = table.slice(0, None if limit is None else limit - written)
            writer = writer or pq.ParquetWriter(unfinished, part.schema)
            writer.write_table(part)
            written += part.num_rows
            if written == limit:
                break
    finally:
        if writer:
            writer.close()
    if written:
        os.replace(unfinished, path)
    return written
