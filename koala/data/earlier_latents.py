"""Latents of images that an earlier run of `encode` met."""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors import safe_open
from torch import Tensor

from koala.data import earlier
from koala.data.executor import each
from koala.run import STATE

PLACEMENT = (
    "bucket_height",
    "bucket_width",
    "original_height",
    "original_width",
    "crop_top",
    "crop_left",
    "flipped",
)
"""Columns that follow from the image, its recorded size and the recipe."""


class EarlierLatents:
    """Latents and placements by the sample's identity. It can be pickled; worker processes open its files for themselves."""

    def __init__(self, folder: Path, index: Path) -> None:
        """Name the folder that holds latents, and its index."""
        self._folder = folder
        self._rows = earlier.Rows(index)

    def find(self, identity: str) -> tuple[dict[str, Any], Tensor] | None:
        """Return a sample's placement and latent, where it was encoded before."""
        key = bytes.fromhex(identity)
        row = self._rows.find([key]).get(key)
        if row is None:
            return None
        file, number, *placement = row
        return dict(zip(PLACEMENT, placement, strict=True)), _opened(self._folder / file).get_slice("latents")[number]


def earlier_latents(out: Path, processes: int) -> EarlierLatents | None:
    """Return what an earlier run has encoded, if there is such a run. Its files are read once, and verified."""
    folder = earlier.find(out)
    if folder is None:
        return None
    tables, file = sorted(folder.glob("*.parquet")), out / STATE / earlier.INDEX
    with each(partial(_rows_of, folder), tables, processes) as described:
        earlier.index(file, described)
    return EarlierLatents(folder.resolve(), file)


def _rows_of(folder: Path, table: Path) -> dict[bytes, Any]:
    """Return file, row and placement of a shard's latents by identity; none of a shard that is not as its manifest says."""
    if not earlier.is_intact(table, *folder.glob(f"{table.stem}-*.safetensors")):
        return {}
    rows = pq.read_table(table, columns=["identity", "error", "file", "row", *PLACEMENT]).to_pylist()
    return {
        bytes.fromhex(row["identity"]): [row["file"], row["row"], *(row[name] for name in PLACEMENT)]
        for row in rows
        if row["error"] is None
    }


@lru_cache(maxsize=64)
def _opened(file: Path) -> Any:
    return safe_open(file, framework="pt")
