"""A folder as a target: a shared file system, or a folder beside the project."""

import os
import shutil
from pathlib import Path
from typing import Literal

from koala.publish.targets.base import Target
from koala.run import STATE


class FolderTarget(Target):
    """Copies of releases in a folder, one a student."""

    kind: Literal["folder"] = "folder"
    """Name of the kind."""

    path: Path
    """Folder of the releases; a student's release is `path / NAME`."""

    def send(self, release: Path, name: str) -> dict[str, str]:
        """Copy the release, then move the copy into place of an earlier one. Return its `path`."""
        place, copy, old = self.path / name, self.path / f".{name}.copy", self.path / f".{name}.old"
        for left in (copy, old):
            shutil.rmtree(left, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        shutil.copytree(release, copy, ignore=shutil.ignore_patterns(STATE))
        if place.exists():
            os.replace(place, old)
        os.replace(copy, place)
        shutil.rmtree(old, ignore_errors=True)
        return {"path": str(place)}
