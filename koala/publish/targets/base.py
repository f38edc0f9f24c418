"""The base of every target of a release."""

from abc import ABC, abstractmethod
from pathlib import Path

from koala.config import Config
from koala.console import progress
from koala.publish.versions import Manifest


class Target(Config, ABC):
    """A place that releases are sent to; its kinds are subclasses, one file each."""

    kind: str
    """Name of the kind."""

    @abstractmethod
    def send(self, release: Path, name: str, stands: bool = True) -> dict[str, str]:
        """Send the folder `release` under `name`. Return what the receipt shall hold of it.

        Sending a release a second time changes nothing. What stands at the target is whole at any time, and stays where
        `stands` is off: the release is a version beside it then.
        """

    def shelf(self, name: str) -> "Shelf | None":
        """Return the versions of student `name`; None where the target keeps none."""
        return None


class Shelf(ABC):
    """The versions of one student at a target."""

    @abstractmethod
    def versions(self) -> list[str]:
        """Return the versions, the oldest first; one whose upload broke is among them."""

    @abstractmethod
    def latest(self) -> str | None:
        """Return the version that latest.json names; None where there is none."""

    @abstractmethod
    def manifest(self, version: str) -> Manifest:
        """Return what a version holds. Raises KoalaError where there is no such version."""

    @abstractmethod
    def read(self, version: str, file: str) -> bytes | None:
        """Return the content of a small file of a version; None where it has none of that name."""

    @abstractmethod
    def sha256(self, version: str, file: str) -> str | None:
        """Read a file of a version and return its SHA-256; None where it is missing."""

    @abstractmethod
    def sizes(self, version: str) -> dict[str, int]:
        """Return the bytes of each file of a version that lies there. Reads none of them."""

    @abstractmethod
    def point_to(self, version: str) -> None:
        """Let latest.json name a version. Raises KoalaError where another publisher moved it meanwhile."""

    def candidates(self) -> list[str]:
        """Return what was sent and is no version yet, in words: a publisher may be at work, or may have been killed."""
        return []

    def holding(self, manifest: Manifest) -> str | None:
        """Return the newest version that holds these files; None where there is none."""
        return next((each for each in reversed(self.versions()) if self.manifest(each) == manifest), None)

    def missing(self, version: str) -> list[str]:
        """Return the files of a version that are missing or of another size: its upload broke. Reads none of them."""
        files, there = self.manifest(version).files, self.sizes(version)
        return [name for name in sorted(files) if there.get(name) != files[name].size]

    def damaged(self, version: str) -> list[str]:
        """Return the files of a version that are missing or hold other bytes. Reads all of them."""
        files = self.manifest(version).files
        return [
            name
            for name in progress(sorted(files), f"verify {version}")
            if self.sha256(version, name) != files[name].sha256
        ]
