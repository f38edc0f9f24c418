"""A memory of what was computed of images, by the hash of their bytes: in one run or, where the file stays, in many."""

import errno
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Self

Part = tuple[bytes, str]
"""An image's SHA-256, and the name of what was computed of it."""


class Known:
    """A file of values by image and name. Several processes of one machine may share it."""

    def __init__(self, file: Path) -> None:
        """Open the file, or make it. Raises OSError if the disk is full, as `add` does."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file
        with self._written():
            self._database = sqlite3.connect(file, timeout=60, isolation_level=None)
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS known (image BLOB, part TEXT, value BLOB, PRIMARY KEY (image, part)) WITHOUT ROWID"
            )

    def find(self, images: Iterable[bytes], parts: Iterable[str]) -> dict[Part, bytes]:
        """Return what is known of some images."""
        wanted, named = set(images), set(parts)
        query = f"SELECT image, part, value FROM known WHERE image IN ({','.join('?' * len(wanted))})"
        rows = self._database.execute(query, sorted(wanted))
        return {(image, part): value for image, part, value in rows if part in named}

    def add(self, values: Mapping[Part, bytes]) -> None:
        """Remember values, all or none of them."""
        with self._written(), closing(self._database.cursor()) as cursor:
            cursor.execute("BEGIN IMMEDIATE")
            cursor.executemany("INSERT OR REPLACE INTO known VALUES (?, ?, ?)", [(*key, values[key]) for key in values])
            cursor.execute("COMMIT")

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Raise OSError where no more can be written. SQLite tells only of a disk that is full, not of a quota or a limit."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE):
                raise
            raise OSError(errno.ENOSPC, str(error), str(self._file)) from error

    def __enter__(self) -> Self:
        """Return the file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._database.close()
