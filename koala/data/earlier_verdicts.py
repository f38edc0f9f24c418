"""What an earlier run of `filter` found of samples by themselves.

It lies in two tables a shard, row by row: verdicts/NAME.parquet, and judged/NAME.parquet with what the verdicts lack.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from koala.data import earlier
from koala.data.executor import each
from koala.data.shards import Sample
from koala.data.tally import FOLDER
from koala.run import STATE

JUDGED = "judged"
"""Folder of what verdicts lack, in the filter's `out`."""


def identity(sample: Sample) -> bytes:
    """Return a hash of all of a sample but its key, which is a place."""
    meta = {name: value for name, value in sample.meta.items() if name != "key"}
    text = json.dumps([sample.caption, meta], sort_keys=True)
    return hashlib.sha256(hashlib.sha256(sample.image).digest() + text.encode()).digest()


class EarlierVerdicts:
    """Judged samples by identity. It can be pickled; worker processes open its files for themselves."""

    def __init__(self, folder: Path, index: Path) -> None:
        """Name the folder that holds the tables, and its index."""
        self._folder = folder
        self._rows = earlier.Rows(index)

    def find(self, identities: Collection[bytes]) -> dict[bytes, dict[str, Any]]:
        """Return the columns of the samples that were judged before."""
        places = defaultdict[str, dict[int, bytes]](dict)
        for key, (shard, row) in self._rows.find(identities).items():
            places[shard][row] = key
        found = dict[bytes, dict[str, Any]]()
        for shard, rows in places.items():
            verdicts, judged = (
                pq.read_table(self._folder / part / f"{shard}.parquet").take(list(rows)).to_pylist()
                for part in (FOLDER, JUDGED)
            )
            found |= {key: verdict | own for key, verdict, own in zip(rows.values(), verdicts, judged, strict=True)}
        return found


def earlier_verdicts(out: Path, processes: int) -> EarlierVerdicts | None:
    """Return what an earlier run has judged, if there is such a run. Its tables are read once, and verified."""
    folder = earlier.find(out, parts=(FOLDER, JUDGED))
    if folder is None:
        return None
    tables, file = sorted((folder / JUDGED).glob("*.parquet")), out / STATE / earlier.INDEX
    with each(partial(_rows_of, folder), tables, processes) as described:
        earlier.index(file, described)
    return EarlierVerdicts(folder.resolve(), file)


def _rows_of(folder: Path, table: Path) -> Mapping[bytes, Any]:
    """Return shard and row of a table's samples by identity; none of a table that is not as the manifest says."""
    if not earlier.is_intact(table, folder / FOLDER / table.name, folder=folder):
        return {}
    column = pq.read_table(table, columns=["identity"])["identity"].to_pylist()
    return {key: [table.stem, row] for row, key in enumerate(column) if key is not None}
