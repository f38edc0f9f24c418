"""A folder as a target: a shared file system, or a folder beside the project."""

import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from koala.errors import KoalaError
from koala.publish.targets.base import Shelf, Target
from koala.publish.versions import LATEST, MANIFEST, Manifest, after, latest, no_such_version, numbered, read_latest


class FolderTarget(Target):
    """Versions of releases in a folder: `path / NAME / v1`, `v2`, ..., and latest.json."""

    kind: Literal["folder"] = "folder"
    """Name of the kind."""

    path: Path
    """Folder of the releases."""

    def send(self, release: Path, name: str, stands: bool = True) -> dict[str, str]:
        """Copy the release to a new version, or find the one that holds it; if it `stands`, let latest.json name it.

        Files of that version that are missing or damaged are copied again.

        Returns its `version` and `path`. Of several publishers one waits for the other.
        """
        manifest, shelf = Manifest.of(release), self.shelf(name)
        shelf.place.mkdir(parents=True, exist_ok=True)
        with _alone(shelf.place):
            version = shelf.holding(manifest)
            if version is None:
                version = after(shelf.versions())
                _copy(release, manifest, shelf.place / version)
            else:
                _mend(release, shelf.damaged(version), shelf.place / version)
            if stands:
                shelf.point_to(version)
        return {"version": version, "path": str(shelf.place / version)}

    def shelf(self, name: str) -> "FolderShelf":
        """Return the versions of student `name`."""
        return FolderShelf(self.path / name)


class FolderShelf(Shelf):
    """The versions of one student in a folder."""

    def __init__(self, place: Path) -> None:
        """Take the versions of the folder `place`, which need not exist."""
        self.place = place

    def versions(self) -> list[str]:
        """Return the versions, the oldest first."""
        if not self.place.is_dir():
            return []
        return numbered(path.name for path in self.place.iterdir() if (path / MANIFEST).is_file())

    def latest(self) -> str | None:
        """Return the version that latest.json names."""
        file = self.place / LATEST
        return read_latest(file.read_text(), str(file)) if file.is_file() else None

    def manifest(self, version: str) -> Manifest:
        """Return what a version holds."""
        file = self.place / version / MANIFEST
        if version not in self.versions():
            raise KoalaError(no_such_version(version, str(self.place), self.versions()))
        return Manifest.read(file.read_text(), str(file))

    def read(self, version: str, file: str) -> bytes | None:
        """Return the content of a file of a version."""
        path = self.place / version / file
        return path.read_bytes() if path.is_file() else None

    def sha256(self, version: str, file: str) -> str | None:
        """Read a file of a version and return its SHA-256."""
        path = self.place / version / file
        if not path.is_file():
            return None
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    def sizes(self, version: str) -> dict[str, int]:
        """Return the bytes of each file of a version."""
        place = self.place / version
        return {file.relative_to(place).as_posix(): file.stat().st_size for file in place.rglob("*") if file.is_file()}

    def point_to(self, version: str) -> None:
        """Let latest.json name a version."""
        # A rollback does not wait for a publisher's lock, so that each has a file of its own.
        partial = self.place / f".{LATEST}.{secrets.token_hex(8)}"
        partial.write_text(latest(version, self.manifest(version)))
        os.replace(partial, self.place / LATEST)


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    with (place / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _copy(release: Path, manifest: Manifest, version: Path) -> None:
    """Make the version appear in one step."""
    partial = _copied(release, manifest.files, version)
    (partial / MANIFEST).write_text(manifest.text())
    os.rename(partial, version)


def _mend(release: Path, files: Sequence[str], version: Path) -> None:
    """Let files of a version be those of the release again, each in one step."""
    if files:
        partial = _copied(release, files, version)
        for name in files:
            (version / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial / name, version / name)
        shutil.rmtree(partial)


def _copied(release: Path, files: Iterable[str], version: Path) -> Path:
    """Copy files of the release into a folder beside the version. Return that folder."""
    partial = version.with_name(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a publisher that was killed
    for name in files:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(release / name, partial / name)
    return partial
