"""A memory of what was computed of images, by the hash of their bytes: in one run or, where the file stays, in many."""

import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Self

Part = tuple[bytes, str]
"""An image's SHA-256, and the name of what was computed of it."""


class Known:
    """A file of values by image and name. Several processes of one machine may share it."""

    def __init__(self, file: Path) -> None:
        """Open the file, or make it."""
        file.parent.mkdir(parents=True, exist_ok=True)
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
        with closing(self._database.cursor()) as cursor:
            cursor.execute("BEGIN IMMEDIATE")
            cursor.executemany("INSERT OR REPLACE INTO known VALUES (?, ?, ?)", [(*key, values[key]) for key in values])
            cursor.execute("COMMIT")

    def __enter__(self) -> Self:
        """Return the file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._database.close()
