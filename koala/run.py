"""What a stage reports while it runs, whoever listens: `koala.tracking` sends it to MLflow, `NoRun` drops it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

STATE = "state"
"""Folder inside a stage's `out` for what only resuming needs: the runner keeps it out of the artifact."""
EARLIER = "earlier"
"""Folder inside STATE with what the stage made last of another list, all else being the same, where the runner has it."""


class Run(Protocol):
    """The run that a stage reports to. Only one process of a distributed stage holds it."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at a step."""

    def last_step(self, metric: str) -> int:
        """Return the last step at which `metric` was logged, or -1."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""

    def image(self, image: "Image", key: str, step: int) -> None:
        """Log an image under a key; images of one key are a series over steps."""

    def figure(self, figure: "Figure", name: str) -> None:
        """Log a plot as a file called `name`."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file, or all files of a folder."""

    def register(self, model: str, content: str, files: Sequence[Path], tags: Mapping[str, str], alias: str) -> None:
        """Register `files` as a version of `model`, called `alias`; tag it.

        The version that has the same `content`, a hash of all that the release holds, is used again.
        """


class NoRun:
    """A run that nobody listens to: for notebooks and tests."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Do nothing."""

    def last_step(self, metric: str) -> int:
        """Return -1."""
        return -1

    def tags(self, values: Mapping[str, str]) -> None:
        """Do nothing."""

    def image(self, image: "Image", key: str, step: int) -> None:
        """Do nothing."""

    def figure(self, figure: "Figure", name: str) -> None:
        """Do nothing."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Do nothing."""

    def register(self, model: str, content: str, files: Sequence[Path], tags: Mapping[str, str], alias: str) -> None:
        """Do nothing."""
