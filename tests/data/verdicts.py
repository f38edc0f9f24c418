"""Verdicts of the filter, made by hand, with the input shards that they are of."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from koala.data.shards import Sample, ShardWriter

TEXT = ("key", "url", "caption", "rule", "shard", "language", "license")
VALUES = ("words", "size", "aesthetic")
SCHEMA = pa.schema(
    {
        **dict.fromkeys(TEXT, pa.string()),
        "sha256": pa.binary(32),
        "dhash": pa.uint64(),
        "original_width": pa.int32(),
        "original_height": pa.int32(),
        "group": pa.int64(),
        **dict.fromkeys(VALUES, pa.float64()),
    }
)
SIDE = 8


def verdict(number: int, rule: str | None = None, **columns: Any) -> dict[str, Any]:
    """A row; a kept one if there is no rule."""
    row = {
        "key": f"{number:09d}",
        "url": f"https://example.com/{number}.jpg",
        "caption": f"caption of {number}",
        "rule": rule,
        "shard": None if rule else "00000",
        "sha256": hashlib.sha256(str(number).encode()).digest(),
        "original_width": 64,
        "original_height": 48,
        "words": 3.0,
        "size": 48.0,
    }
    return row | columns


def colour(number: int) -> tuple[int, int, int]:
    """The colour of a sample's image."""
    return (number % 16 * 16, number // 16 % 16 * 16, 128)


def write(folder: Path, shards: Sequence[Sequence[Mapping[str, Any]]], broken: Sequence[int] = ()) -> tuple[Path, Path]:
    """Write the verdicts on each input shard, and the shards: images of one colour. Return both folders."""
    verdicts, images = folder / "verdicts", folder / "images"
    verdicts.mkdir(parents=True)
    size = max(len(shards[0]), 1)
    with ShardWriter(images, size) as writer:
        for number, rows in enumerate(shards):
            pq.write_table(
                pa.Table.from_pylist([dict(row) for row in rows], SCHEMA), verdicts / f"{number:05d}.parquet"
            )
            for row in sorted(rows, key=lambda row: row["key"]):
                content = io.BytesIO()
                Image.new("RGB", (SIDE, SIDE), colour(int(row["key"]))).save(content, "PNG")
                data = b"broken" if int(row["key"]) in broken else content.getvalue()
                writer.write(Sample(row["key"], data, "png", row["caption"], {}))
    return verdicts, images
