"""Encoded samples on disk: what `encode` writes and distillation reads.

For every shard of kept images, NAME: `NAME.parquet`, a row a sample (columns: COLUMNS), and `NAME-HxW.safetensors` for
each bucket of H x W pixels that the shard has samples of, with one tensor `latents`, n x 4 x h x w, scaled.
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
        "file": pa.string(),  # the safetensors file that holds the latent, and its row there
        "row": pa.int32(),
        "bucket_height": pa.int32(),
        "bucket_width": pa.int32(),
        "original_height": pa.int32(),  # of the image before it was resized, as SDXL is told
        "original_width": pa.int32(),
        "crop_top": pa.int32(),  # of the bucket within the resized image
        "crop_left": pa.int32(),
        "flipped": pa.bool_(),
    }
)


@dataclass(frozen=True)
class EncodedSample:
    """latent: 4 x h x w, scaled by the VAE's factor; time_ids: SDXL's six (original, crop, target; height first), px."""

    latent: Tensor
    caption: str
    time_ids: tuple[int, ...]


class LatentSet:
    """All encoded samples of a folder, by number. Latents stay on disk until they are asked for."""

    def __init__(self, folder: Path) -> None:
        tables = [pq.read_table(file, schema=COLUMNS) for file in sorted(folder.glob("*.parquet"))]
        if not tables or not sum(map(len, tables)):
            raise KoalaError(f"{folder} holds no encoded samples: run `dvc repro encode` first")
        self._folder = folder
        self._table = pa.concat_tables(tables).combine_chunks()
        self._open: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> EncodedSample:
        row = self._table.slice(number, 1).to_pylist()[0]
        latents = self._file(row["file"]).get_slice("latents")
        bucket = (row["bucket_height"], row["bucket_width"])
        time_ids = (row["original_height"], row["original_width"], row["crop_top"], row["crop_left"], *bucket)
        return EncodedSample(latents[row["row"]], row["caption"], time_ids)

    @cached_property
    def buckets(self) -> dict[tuple[int, int], np.ndarray]:
        """Numbers of the samples in each bucket, (height, width) in pixels."""
        sizes = np.stack([self._table[f"bucket_{side}"].to_numpy() for side in ("height", "width")], axis=1)
        return {
            (int(height), int(width)): np.flatnonzero((sizes == (height, width)).all(axis=1))
            for height, width in np.unique(sizes, axis=0)
        }

    def captions(self, numbers: Sequence[int]) -> list[str]:
        """The captions of some samples."""
        return self._table["caption"].take(pa.array(numbers)).to_pylist()

    def keys(self, numbers: Sequence[int]) -> list[str]:
        """The keys of some samples, as the filter's report has them."""
        return self._table["key"].take(pa.array(numbers)).to_pylist()

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self._folder / name, framework="pt")
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to the processes that load data; each opens its own.
        return {**self.__dict__, "_open": {}}
