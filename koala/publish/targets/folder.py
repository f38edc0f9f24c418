"""A folder as a target: a shared file system, or a folder beside the project."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from koala.publish.targets.base import Target
from koala.publish.versions import LATEST, MANIFEST, Manifest, after, latest, numbered


class FolderTarget(Target):
    """Versions of releases in a folder: `path / NAME / v1`, `v2`, ..., and latest.json."""

    kind: Literal["folder"] = "folder"
    """Name of the kind."""

    path: Path
    """Folder of the releases."""

    def send(self, release: Path, name: str) -> dict[str, str]:
        """Copy the release to a new version, or find the one that holds it, and let latest.json name it.

        Returns its `version` and `path`. Of several publishers one waits for the other.
        """
        manifest, place = Manifest.of(release), self.path / name
        place.mkdir(parents=True, exist_ok=True)
        with _alone(place):
            versions = numbered(path.name for path in place.iterdir() if path.is_dir())
            version = next((each for each in reversed(versions) if _holds(place / each, manifest)), None)
            if version is None:
                version = after(versions)
                _copy(release, manifest, place / version)
            partial = place / f".{LATEST}"
            partial.write_text(latest(version, manifest))
            os.replace(partial, place / LATEST)
        return {"version": version, "path": str(place / version)}


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    with (place / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _holds(version: Path, manifest: Manifest) -> bool:
    file = version / MANIFEST
    return file.is_file() and Manifest.read(file.read_text(), str(file)) == manifest


def _copy(release: Path, manifest: Manifest, version: Path) -> None:
    """Make the version appear in one step."""
    partial = version.with_name(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a publisher that was killed
    for name in manifest.files:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(release / name, partial / name)
    (partial / MANIFEST).write_text(manifest.text())
    os.rename(partial, version)
