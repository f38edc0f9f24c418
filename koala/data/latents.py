"""Encoded samples on disk, as the stage `encode` writes and distillation reads them.

A shard NAME of images becomes `NAME.parquet`, one row per sample (see COLUMNS), and one `NAME-HxW.safetensors` for each
bucket of H x W pixels that has samples in it. That file holds one tensor `latents`, n x 4 x h x w, scaled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from torch import Tensor

from koala.errors import KoalaError

COLUMNS = pa.schema(
    {
        "key": pa.string(),
        "caption": pa.string(),
        "file": pa.string(),  # safetensors file that holds the latent
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


@dataclass(frozen=True)
class EncodedSample:
    """A latent with SDXL's conditioning."""

    latent: Tensor
    """4 x h x w, scaled by the VAE's factor."""
    caption: str
    """Text prompt."""
    time_ids: tuple[int, ...]
    """SDXL's six sizes in pixels: original, crop, target; height first."""


class LatentSet:
    """All encoded samples of a folder, by index. Latents are read from disk when a sample is requested."""

    def __init__(self, folder: Path) -> None:
        """Read the samples' captions and sizes. Raises KoalaError if `folder` holds no samples."""
        tables = [pq.read_table(file, schema=COLUMNS) for file in sorted(folder.glob("*.parquet"))]
        if not tables or not sum(map(len, tables)):
            raise KoalaError(f"{folder} holds no encoded samples: run `dvc repro encode` first")
        self._folder = folder
        self._table = pa.concat_tables(tables).combine_chunks()
        self._open: dict[str, Any] = {}

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._table)

    def __getitem__(self, index: int) -> EncodedSample:
        """Read one sample."""
        row = self._table.slice(index, 1).to_pylist()[0]
        latents = self._file(row["file"]).get_slice("latents")
        bucket = (row["bucket_height"], row["bucket_width"])
        time_ids = (row["original_height"], row["original_width"], row["crop_top"], row["crop_left"], *bucket)
        return EncodedSample(latents[row["row"]], row["caption"], time_ids)

    @cached_property
    def buckets(self) -> dict[tuple[int, int], np.ndarray]:
        """Indices of the samples in each bucket (height, width) in pixels."""
        sizes = np.stack([self._table[f"bucket_{side}"].to_numpy() for side in ("height", "width")], axis=1)
        return {
            (int(height), int(width)): np.flatnonzero((sizes == (height, width)).all(axis=1))
            for height, width in np.unique(sizes, axis=0)
        }

    def captions(self, indices: Sequence[int]) -> list[str]:
        """Return the captions of some samples."""
        captions: list[str] = self._table["caption"].take(pa.array(indices)).to_pylist()
        return captions

    def keys(self, indices: Sequence[int]) -> list[str]:
        """Return the keys of some samples, as in the shards of images."""
        keys: list[str] = self._table["key"].take(pa.array(indices)).to_pylist()
        return keys

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self._folder / name, framework="pt")
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without open files, which cannot be sent to data loader workers: each opens its own."""
        return {**self.__dict__, "_open": {}}
