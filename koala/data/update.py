"""`koala data update`: takes the content of a source as it is now for the one that is meant."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from koala.console import say, show
from koala.data import pins
from koala.data.parquet import named
from koala.data.pins import Pin
from koala.data.table_files import ChangedError, located
from koala.data.tables import TableSource
from koala.errors import KoalaError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


@dataclass(frozen=True)
class Content:
    """The content of a source as it is now: what its pin would say, without a count of rows."""

    location: str
    """Location that was resolved."""
    commit: str | None
    """Commit of the data set on the Hub."""
    files: Mapping[str, str]
    """What marks the content of each file, in the order in which they are read."""

    def is_pinned(self, pin: Pin | None) -> bool:
        """Return whether a pin says the same."""
        ours = self.location, self.commit, self.files
        return pin is not None and (pin.location, pin.commit, pin.files) == ours

    @property
    def digest(self) -> str:
        """Return what tells this content from others."""
        parts = [self.location, self.commit, list(self.files.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def resolve(config: TableSource) -> Content:
    """Return a source's content as it is now, whatever its pin says. No table is read.

    Raises KoalaError if the source cannot be reached.
    """
    commit = located(config.model_copy(update={"pin": None})).commit()
    files = located(config.model_copy(update={"pin": None, "revision": commit or config.revision}))
    return Content(config.location, commit, {name: files.mark(name) for name in files.names})


def pin(config: TableSource, content: Content) -> Pin:
    """Return the pin of a source's content: its rows are read and counted.

    Raises KoalaError if the source cannot be read, holds no usable row, or is no longer what was resolved.
    """
    return _pin(content, len(_rows(config, content)))


def update(profile: str, config: TableSource, table: Path) -> None:
    """Pin the content of a profile's source as it is now, and show what changed.

    Args:
        profile: Whose source it is.
        config: The source, with its pin if it has one.
        table: The table that was made last, if there is one: rows are compared with it, by URL.

    Raises:
        KoalaError: The source cannot be read, holds no usable row, or changed while it was read.
    """
    content = resolve(config)
    if config.pin and content.is_pinned(config.pin):
        show(f"{profile}: {config.location} is what the pin says: {config.pin.rows:,} usable rows")
        return
    rows = _rows(config, content)
    moved = _pin(content, len(rows))
    for line in changes(config.pin, moved):
        show(f"{profile}: {line}")
    if parts := sorted(table.glob("*.parquet")):
        added, removed = _difference(rows, _hashes(_read(parts)))
        show(f"{profile}: {added:,} rows added and {removed:,} removed, by URL, beside the table in {table}")
    pins.write({**pins.read(), profile: moved})
    say(f"{pins.FILE} has the new pin: commit it, and run the pipeline")


def _rows(config: TableSource, content: Content) -> "np.ndarray":
    """Return a hash of each usable row's URL. Raises KoalaError where there is none, or where the content changed."""
    dropped: Counter[str] = Counter()
    as_resolved = config.model_copy(update={"pin": _pin(content, rows=0)})
    try:
        rows = _hashes(as_resolved.tables(dropped))
    except ChangedError:
        raise KoalaError(f"{config.location} changed while it was read: run `koala data update` again") from None
    if not len(rows):
        raise KoalaError(f"{config.location} holds no usable row (dropped: {dict(dropped)}): nothing is pinned")
    return rows


def _pin(content: Content, rows: int) -> Pin:
    return Pin(location=content.location, commit=content.commit, files=dict(content.files), rows=rows)


def changes(before: Pin | None, now: Pin) -> list[str]:
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


def _read(parts: Iterable[Path]) -> "Iterator[pa.Table]":
    import pyarrow.parquet as pq

    for part in parts:
        with named(part):
            table = pq.read_table(part, columns=["url"])
        yield table


def _difference(now: "np.ndarray", before: "np.ndarray") -> tuple[int, int]:
    """Return how many hashes came and went."""
    import numpy as np

    return len(np.setdiff1d(now, before)), len(np.setdiff1d(before, now))
