"""Where a sample that is taken down stands: in the images, in what was kept of them, in the latents."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from koala.data.forget import Forgotten
from koala.data.parquet import named

Found = dict[str, set[str]]
"""Artifact -> keys of samples."""


def whereabouts(entry: Forgotten, images: Path, kept: Path, latents: Path) -> Found:
    """Return the keys of an entry's samples in each folder; a folder that is not there holds none.

    A shard's samples are known by the outcomes of the download (URL, SHA-256 of the fetched file) and by the filter's verdicts
    (URL, SHA-256 and dHash of the stored image).
    """
    fetched = {
        row["key"]
        for row in _rows(images, ("key", "url", "sha256", "status"))
        if row.get("status") == "success" and _is(entry, row.get("url"), row.get("sha256"))
    }
    verdicts = [
        row
        for row in _rows(kept / "verdicts", ("key", "url", "sha256", "dhash", "rule"))
        if row["key"] in fetched or _is(entry, row["url"], row["sha256"].hex(), row["dhash"])
    ]
    found = fetched | {row["key"] for row in verdicts}
    return {
        "images": found,
        "kept": {row["key"] for row in verdicts if row["rule"] is None},
        "latents": {row["key"] for row in _rows(latents, ("key",)) if row["key"] in found},
    }


def _rows(folder: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for file in sorted(folder.glob("*.parquet")):
        with named(file):
            table = pq.ParquetFile(file)
            there = [name for name in columns if name in table.schema_arrow.names]
            for batch in table.iter_batches(columns=there):
                yield from batch.to_pylist()


def _is(entry: Forgotten, url: str | None, sha256: str | None, dhash: int | None = None) -> bool:
    """Return whether an image is the one that the entry names."""
    if entry.url is not None:
        return url == entry.url
    if entry.sha256 is not None:
        return sha256 == entry.sha256
    return dhash is not None and (dhash ^ int(entry.dhash or "", 16)).bit_count() <= entry.bits
