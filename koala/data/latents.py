"""Encoded samples on disk, as the stage `encode` writes and distillation reads them.

A shard NAME of images becomes

- `NAME-HxW.safetensors` for each bucket of H x W pixels that has samples in it: one tensor `latents`, n x 4 x h x w, scaled;
- `NAME.arrow`, a row per encoded sample with what training reads (COLUMNS). It is memory-mapped: processes share its pages;
- `NAME.parquet`, a row per sample of the shard with all that is known of it (RECORD), also of those that could not be encoded.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from koala.data import manifest
from koala.errors import KoalaError

COLUMNS = pa.schema(
    {
        "key": pa.string(),
        "caption": pa.string(),
        "file": pa.dictionary(pa.int32(), pa.string()),  # safetensors file that holds the latent
        "row": pa.int32(),  # index of the latent in that file
        "bucket_height": pa.int32(),
        "bucket_width": pa.int32(),
        "original_height": pa.int32(),  # of the image before any resizing: SDXL's original_size
        "original_width": pa.int32(),
        "crop_top": pa.int32(),  # of the bucket within the resized image: SDXL's crop coordinates
        "crop_left": pa.int32(),
        "flipped": pa.bool_(),
    }
)
RECORD = pa.schema(
    [
        *COLUMNS,
        pa.field("url", pa.string()),
        pa.field("sha256", pa.string()),  # of the fetched file
        pa.field("identity", pa.string()),  # SHA-256 of the image and its recorded size: what the latent follows from
        pa.field("meta", pa.string()),  # the sample's other metadata as a JSON object: scores, licence
        pa.field("error", pa.string()),  # why it could not be encoded; null if it was
    ]
)


@dataclass(frozen=True)
class EncodedSample:
    """A latent with SDXL's conditioning."""

    latent: Tensor
    """4 x h x w, scaled by the VAE's factor."""
    caption: str
    """Text prompt."""
    time_ids: tuple[int, ...]
    """SDXL's six sizes in pixels: original, crop, target; height first."""


def write_shard(
    folder: Path, name: str, rows: Sequence[Mapping[str, Any]], latents: Mapping[str, Sequence[Tensor]]
) -> None:
    """Write a shard's samples: rows of RECORD, ordered by key, and the latents of each safetensors file in the same order.

    The parquet file is written last, each table in one step: a shard that has its parquet file is finished.
    """
    encoded = [row for row in rows if row.get("error") is None]
    for file, tensors in latents.items():
        digest = _digest(row["key"] for row in encoded if row["file"] == file)
        save_file({"latents": torch.stack(list(tensors))}, folder / file, metadata={"keys": digest})
    unfinished = folder / f"{name}.part"
    with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, COLUMNS) as writer:
        writer.write_table(pa.Table.from_pylist(encoded, COLUMNS))
    os.replace(unfinished, folder / f"{name}.arrow")
    pq.write_table(pa.Table.from_pylist(rows, RECORD), unfinished)
    os.replace(unfinished, folder / f"{name}.parquet")


class LatentSet:
    """All encoded samples of a folder, by index. Latents and captions are read from disk when a sample is requested."""

    def __init__(self, folder: Path) -> None:
        """Open a folder. Raises KoalaError if it holds no samples, or other files than its manifest lists."""
        manifest.check(folder)
        self._enter(folder)
        if not len(self):
            raise KoalaError(f"{folder} holds no encoded samples: run `dvc repro encode` first")

    def _enter(self, folder: Path) -> None:
        self._folder = folder
        self._tables = [table for file in sorted(folder.glob("*.arrow")) if len(table := _mapped(file))]
        self._starts = np.cumsum([0, *map(len, self._tables)])
        self._open: dict[str, Any] = {}

    def __len__(self) -> int:
        """Return the number of samples."""
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> EncodedSample:
        """Read one sample. Raises KoalaError if its file of latents is missing, broken, or not of this shard."""
        table, place = self._find(index)
        row = {name: table[name][place].as_py() for name in table.schema.names}
        latents = self._file(row["file"], table)
        bucket = (row["bucket_height"], row["bucket_width"])
        time_ids = (row["original_height"], row["original_width"], row["crop_top"], row["crop_left"], *bucket)
        return EncodedSample(latents[row["row"]], row["caption"], time_ids)

    @cached_property
    def buckets(self) -> dict[tuple[int, int], np.ndarray]:
        """Indices of the samples in each bucket (height, width) in pixels."""
        found: dict[tuple[int, int], list[np.ndarray]] = {}
        for start, table in zip(self._starts[:-1], self._tables, strict=True):
            heights, widths = (table[f"bucket_{side}"].to_numpy() for side in ("height", "width"))
            for height, width in sorted(set(zip(heights.tolist(), widths.tolist(), strict=True))):
                places = np.flatnonzero((heights == height) & (widths == width))
                found.setdefault((height, width), []).append(start + places)
        return {bucket: np.concatenate(parts) for bucket, parts in sorted(found.items())}

    def captions(self, indices: Sequence[int]) -> list[str]:
        """Return the captions of some samples."""
        return self._column("caption", indices)

    def keys(self, indices: Sequence[int]) -> list[str]:
        """Return the keys of some samples, as in the shards of images."""
        return self._column("key", indices)

    def _column(self, name: str, indices: Sequence[int]) -> list[str]:
        return [table[name][place].as_py() for table, place in map(self._find, indices)]

    def _find(self, index: int) -> tuple[pa.RecordBatch, int]:
        """Return the shard's table that holds a sample, and the sample's row in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._tables[shard], index - int(self._starts[shard])

    def _file(self, name: str, table: pa.RecordBatch) -> Any:
        if name not in self._open:
            self._open[name] = _latents(self._folder / name, table)
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        """Return the folder only: a data loader's worker maps the files itself."""
        return {"_folder": self._folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the folder."""
        self._enter(state["_folder"])


def _mapped(file: Path) -> pa.RecordBatch:
    """Return a shard's table, memory-mapped. Raises KoalaError if it is no such table."""
    try:
        with pa.memory_map(str(file)) as source, pa.ipc.open_file(source) as reader:
            if reader.schema != COLUMNS:
                raise KoalaError(f"{file} has other columns than encoded samples: run `dvc repro encode` again")
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except (pa.ArrowInvalid, OSError):
        raise KoalaError(f"{file} is truncated, or no table of samples: run `dvc repro encode` again") from None
    if not batches:
        return pa.RecordBatch.from_pylist([], COLUMNS)
    return batches[0] if len(batches) == 1 else pa.concat_batches(batches)


def _latents(file: Path, table: pa.RecordBatch) -> Any:
    """Return the tensor of a safetensors file, unread. Its samples' keys must be those of `table`."""
    try:
        stored: Any = safe_open(file, framework="pt")
        latents = stored.get_slice("latents")
    except FileNotFoundError:
        raise KoalaError(f"{file} is missing: run `dvc repro encode` again") from None
    except (SafetensorError, OSError):
        raise KoalaError(f"{file} is truncated, or holds no latents: run `dvc repro encode` again") from None
    keys = table.filter(pa.compute.equal(table["file"], file.name))["key"].to_pylist()
    if latents.get_shape()[0] != len(keys) or (stored.metadata() or {}).get("keys") != _digest(keys):
        raise KoalaError(
            f"{file} holds the latents of other samples than its shard's table: run `dvc repro encode` again"
        )
    return latents


def _digest(keys: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(list(keys)).encode()).hexdigest()
