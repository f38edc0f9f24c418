"""`koala data update`: takes the content of a source as it is now for the one that is meant."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from koala.console import say, show
from koala.data import pins
from koala.data.pins import Pin
from koala.data.table_files import located
from koala.data.tables import TableSource
from koala.errors import KoalaError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


def update(profile: str, config: TableSource, table: Path) -> None:
    """Pin the content of a profile's source as it is now, and show what changed.

    Args:
        profile: Whose source it is.
        config: The source, with its pin if it has one.
        table: The table that was made last, if there is one: rows are compared with it, by URL.

    Raises:
        KoalaError: The source cannot be read, holds no usable row, or changed while it was read.
    """
    files = located(config.model_copy(update={"pin": None}))
    commit = files.commit()
    now = config.model_copy(update={"pin": None, "revision": commit or config.revision})
    marks = _marks(now)
    if config.pin and (config.pin.location, config.pin.commit, config.pin.files) == (config.location, commit, marks):
        show(f"{profile}: {config.location} is what the pin says: {config.pin.rows:,} usable rows")
        return
    dropped: Counter[str] = Counter()
    rows = _hashes(now.tables(dropped))
    if not len(rows):
        raise KoalaError(f"{config.location} holds no usable row (dropped: {dict(dropped)}): nothing is pinned")
    if _marks(now) != marks:
        raise KoalaError(f"{config.location} changed while it was read: run `koala data update` again")
    pin = Pin(location=config.location, commit=commit, files=marks, rows=len(rows))
    for line in _changes(config.pin, pin):
        show(f"{profile}: {line}")
    if parts := sorted(table.glob("*.parquet")):
        added, removed = _difference(rows, _hashes(_read(parts)))
        show(f"{profile}: {added:,} rows added and {removed:,} removed, by URL, beside the table in {table}")
    pins.write({**pins.read(), profile: pin})
    say(f"{pins.FILE} has the new pin: commit it, and run the pipeline")


def _marks(config: TableSource) -> dict[str, str]:
    files = located(config)
    return {name: files.mark(name) for name in files.names}


def _changes(before: Pin | None, now: Pin) -> list[str]:
    """Return a line for each thing that the pin says otherwise."""
    if before is None:
        return [f"{now.location} is pinned: {len(now.files)} files, {now.rows:,} usable rows"]
    lines = [f"{before.location} -> {now.location}"] if before.location != now.location else []
    if before.commit != now.commit:
        lines.append(f"commit {before.commit} -> {now.commit}")
    for name in {**before.files, **now.files}:
        then, mark = before.files.get(name, "absent"), now.files.get(name, "absent")
        if then != mark and now.commit is None:
            lines.append(f"{name}: {then} -> {mark}")
    return [*lines, f"usable rows {before.rows:,} -> {now.rows:,}"]


def _hashes(tables: "Iterable[pa.Table]") -> "np.ndarray":
    """Return a hash of 64 bits of each URL."""
    import numpy as np
    import polars as pl

    hashes = [pl.Series(table["url"]).hash(0).to_numpy() for table in tables]
    return np.concatenate([np.empty(0, np.uint64), *hashes])


def _read(parts: Iterable[Path]) -> "Iterable[pa.Table]":
    import pyarrow.parquet as pq

    return (pq.read_table(part, columns=["url"]) for part in parts)


def _difference(now: "np.ndarray", before: "np.ndarray") -> tuple[int, int]:
    """Return how many hashes came and went."""
    import numpy as np

    return len(np.setdiff1d(now, before)), len(np.setdiff1d(before, now))
