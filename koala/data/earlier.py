"""What a stage made last, of an earlier list: rows that did not change are taken from there, by identity, not by position.

    earlier = find(out)                                # the folder, if the runner has one (koala.run.EARLIER)
    index(file, described)                             # identities and where each row lies, a mapping a shard
    Rows(file).find(identities)

A row's identity is a hash of all that it follows from. What is taken over has the bytes that it would have if it were made anew.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from koala.console import say
from koala.data import manifest
from koala.data.scores.known import Known
from koala.errors import KoalaError
from koala.run import EARLIER, STATE

INDEX = "earlier.sqlite"
"""File of the index, in the stage's state."""
_PART = "row"
_AT_ONCE = 10_000  # values of a query: SQLite takes 32,766


def find(out: Path, parts: Sequence[str] | None = None) -> Path | None:
    """Return the folder that an earlier run made, if there is one whose files are as its manifest says, by names and sizes.

    parts: folders in it, where no others are needed.
    """
    folder = out / STATE / EARLIER
    try:
        if not folder.is_dir() or not manifest.read(folder):
            return None
        manifest.check(folder, parts)
    except KoalaError as error:
        say(f"nothing is taken over from the last run: {error}")
        return None
    return folder


def is_intact(*files: Path, folder: Path | None = None) -> bool:
    """Return whether the content of files is as the manifest of `folder` says, or of their own; say of the first that is not."""
    try:
        for file in files:
            manifest.verify(file, folder)
    except (KoalaError, OSError) as error:
        say(f"a shard of the last run is made anew: {error}")
        return False
    return True


def index(file: Path, shards: Iterable[Mapping[bytes, Any]]) -> None:
    """Write, in place of what was there, what is known of rows by their identity, as JSON."""
    for left in file.parent.glob(f"{file.name}*"):
        left.unlink()
    with Known(file) as known:
        for rows in shards:
            known.add({(identity, _PART): json.dumps(row).encode() for identity, row in rows.items()})


class Rows:
    """What an index holds. Each process opens it for itself, when it first looks."""

    def __init__(self, file: Path) -> None:
        """Name the file."""
        self._file = file

    @cached_property
    def _known(self) -> Known:
        return Known(self._file)

    def find(self, identities: Collection[bytes]) -> dict[bytes, Any]:
        """Return what is known of some identities."""
        wanted, found = list(identities), dict[bytes, Any]()
        for first in range(0, len(wanted), _AT_ONCE):
            values = self._known.find(wanted[first : first + _AT_ONCE], [_PART])
            found |= {identity: json.loads(value) for (identity, _), value in values.items()}
        return found


# How many rows were taken over: noted a shard each, so that a run that is resumed knows of all.


def note_reused(folder: Path, shard: str, rows: int) -> None:
    """Note in `folder` how many rows of a shard were taken over."""
    folder.mkdir(exist_ok=True)
    (folder / f"{shard}.reused").write_text(str(rows))


def reused(folder: Path) -> int:
    """Return how many rows were taken over, of all shards."""
    return sum(int(file.read_text() or 0) for file in folder.glob("*.reused"))
