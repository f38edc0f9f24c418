"""Versions of a release at a target: NAME/v1, NAME/v2, ..., and NAME/latest.json, which names one of them.

A version never changes. Its manifest.json lists its files with their SHA-256. latest.json is written last, so that what
it names is whole.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Self

from koala.errors import KoalaError
from koala.run import STATE

LATEST = "latest.json"
MANIFEST = "manifest.json"
TRAINING = "training.json"
"""Provenance of the training."""
GATE = "gate.json"
"""The verdicts that depend on the student alone: what is compared with the champion stands in the receipt, since the champion
of today is another tomorrow, and the same release must stay the same files."""
RECEIPT = "receipt.json"
"""What was required of the student and what targets answered. It stays beside the release, and is not sent."""

_VERSION = re.compile(r"v([1-9]\d*)")


@dataclass(frozen=True)
class File:
    """A file of a release."""

    size: int
    """Its bytes."""
    sha256: str
    """Its SHA-256, in hexadecimal digits."""


@dataclass(frozen=True)
class Manifest:
    """What a version holds."""

    files: Mapping[str, File]
    """Its files by their path in the release, without manifest.json itself."""

    @classmethod
    def of(cls, release: Path) -> Self:
        """List the files of a release folder. Raises KoalaError for a link, which another machine could not follow."""
        files = {}
        for path in sorted(release.rglob("*")):
            name = path.relative_to(release).as_posix()
            if name.partition("/")[0] in (STATE, MANIFEST, RECEIPT):
                continue
            if path.is_symlink():
                raise KoalaError(f"{path} is a link: put the file itself into the release")
            if path.is_dir():
                continue
            with path.open("rb") as content:
                files[name] = File(path.stat().st_size, hashlib.file_digest(content, "sha256").hexdigest())
        return cls(files)

    @classmethod
    def read(cls, text: str | bytes, origin: str) -> Self:
        """Return the manifest that a target keeps. Raises KoalaError where it is none, or names a file outside of the release."""
        try:
            files = {name: File(int(file["size"]), str(file["sha256"])) for name, file in json.loads(text).items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise KoalaError(f"{origin} is not a release's manifest: move what is there out of the way") from None
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or path.as_posix() != name or not path.parts:
                raise KoalaError(f"{origin} names a file outside of the release, {name!r}: someone else wrote it")
        return cls(files)

    def text(self) -> str:
        """Return the content of manifest.json, the same for the same files."""
        files = {name: asdict(self.files[name]) for name in sorted(self.files)}
        return json.dumps(files, indent=2) + "\n"

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of manifest.json, which stands for all that the version holds."""
        return hashlib.sha256(self.text().encode()).hexdigest()


def latest(version: str, manifest: Manifest) -> str:
    """Return the content of latest.json."""
    return json.dumps({"version": version, "manifest_sha256": manifest.sha256}, indent=2) + "\n"


def read_latest(text: str | bytes, origin: str) -> str:
    """Return the version that a latest.json names. Raises KoalaError where it names none."""
    try:
        found = str(json.loads(text)["version"])
        if _VERSION.fullmatch(found):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise KoalaError(f"{origin} does not name a version: move it out of the way")


def numbered(names: Iterable[str]) -> list[str]:
    """Return the versions among `names`, the oldest first."""
    return sorted((name for name in names if _VERSION.fullmatch(name)), key=lambda name: int(name[1:]))


def after(versions: Iterable[str]) -> str:
    """Return the name of the version after all of `versions`."""
    return f"v{max((int(version[1:]) for version in versions), default=0) + 1}"


def no_such_version(version: str, place: str, there_are: Sequence[str]) -> str:
    """Return the line that says so."""
    return (
        f"{place} has no version {version!r}: {'choose one of ' + ', '.join(there_are) if there_are else 'it is empty'}"
    )
