"""New captions of encoded samples by their index, in one file that is aligned before training and mapped by every process."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from koala.data.parquet import named

_SCHEMA = pa.schema({"caption": pa.string()})


def align(captions: Path, latents: Path, file: Path) -> bool:
    """Write the new captions, in the order of the encoded samples, to an Arrow file. Return whether there are any.

    Samples are matched by key within the shard of the same name. One shard is in memory at a time.

    Args:
        captions: What the stage `recaption` made.
        latents: What the stage `encode` made of the same shards.
        file: Where to write; a file that is there stands.
    """
    if not any(captions.glob("*.parquet")):
        return False
    if file.is_file():
        return True
    partial = file.with_suffix(".partial")
    with pa.ipc.new_file(partial, _SCHEMA) as writer:
        for shard in sorted(latents.glob("*.arrow")):  # as LatentSet counts its samples
            with pa.memory_map(str(shard)) as source:
                keys = pa.ipc.open_file(source).read_all()["key"].combine_chunks()
            found = captions / f"{shard.stem}.parquet"
            new = _SCHEMA.empty_table()
            if found.is_file():
                with named(found):
                    new = pq.read_table(found, columns=["key", "caption"])
            column = pa.nulls(len(keys), pa.string())
            if len(new):
                places = pc.index_in(keys, value_set=new["key"].combine_chunks())
                column = new["caption"].combine_chunks().take(places)
            writer.write_batch(pa.record_batch([column], schema=_SCHEMA))
    os.replace(partial, file)
    return True


class NewCaptions:
    """New captions by the index of the encoded sample. Each process maps the file itself, and holds none of it in memory."""

    def __init__(self, file: Path) -> None:
        """Take a file that `align` wrote."""
        self._file = file
        self._opened: tuple[Any, np.ndarray] | None = None

    def __getitem__(self, index: int) -> str | None:
        """Return the new caption of a sample, or None where it has none."""
        reader, starts = self._opened = self._opened or self._open()
        shard = int(np.searchsorted(starts, index, side="right")) - 1
        caption: str | None = reader.get_batch(shard).column(0)[index - int(starts[shard])].as_py()
        return caption

    def _open(self) -> tuple[Any, np.ndarray]:
        reader = pa.ipc.open_file(pa.memory_map(str(self._file)))
        lengths = [reader.get_batch(shard).num_rows for shard in range(reader.num_record_batches)]
        return reader, np.cumsum([0, *lengths])

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the mapping, which cannot be sent to data loader workers: each opens its own."""
        return {**self.__dict__, "_opened": None}
