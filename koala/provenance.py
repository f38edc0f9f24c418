"""Where an artifact came from: the commit, and a hash of what its folder holds."""

import hashlib
import json
import sqlite3
import subprocess
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

FILE = "provenance.json"


@cache
def git_commit() -> str | None:
    """Return the checkout's commit, with `-dirty` behind it where tracked files differ; None outside a git checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def content_hash(folder: Path, known: Path) -> str:
    """Return the SHA-256 of a folder's files and their names, without its provenance.json.

    `known` is a database of file hashes. A file whose inode, size and modification time stand there is not read again,
    so that hundreds of gigabytes are read once. The provenance is left out because it names the run: the same content
    made twice has the same hash.
    """
    known.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with closing(sqlite3.connect(known, timeout=60, isolation_level=None)) as database:
        database.execute("CREATE TABLE IF NOT EXISTS files (identity TEXT PRIMARY KEY, sha256 TEXT)")
        for file in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILE):
            digest.update(f"{file.relative_to(folder).as_posix()}\0{_file_hash(file, database)}\n".encode())
    return digest.hexdigest()


def _file_hash(file: Path, database: sqlite3.Connection) -> str:
    status = file.stat()
    identity = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
    if row := database.execute("SELECT sha256 FROM files WHERE identity = ?", (identity,)).fetchone():
        return str(row[0])
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    database.execute("INSERT OR REPLACE INTO files VALUES (?, ?)", (identity, found))
    return found


def write(folder: Path, values: dict[str, Any]) -> None:
    """Write provenance.json into an artifact."""
    (folder / FILE).write_text(json.dumps(values, indent=2) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """Return an artifact's provenance; empty for a folder that no stage made."""
    file = folder / FILE
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found
