"""The base of every target of a release."""

from abc import ABC, abstractmethod
from pathlib import Path

from koala.config import Config


class Target(Config, ABC):
    """A place that releases are sent to; its kinds are subclasses, one file each."""

    kind: str
    """Name of the kind."""

    @abstractmethod
    def send(self, release: Path, name: str) -> dict[str, str]:
        """Send the folder `release` under `name`. Return what the receipt shall hold of it.

        Sending a release a second time changes nothing. What stands at the target is whole at any time.
        """
