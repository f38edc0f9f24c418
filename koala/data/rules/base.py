"""The base of every filter rule: what one sample must fulfil by itself to be kept.

A rule measures values of a sample and bounds them. A new rule is a file with a subclass of `Rule`, named in the union of
koala/params.py. Keep rules light to import: they are read with params.yaml.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from koala.config import Config
from koala.data.picture import decode
from koala.data.shards import Sample

if TYPE_CHECKING:
    from PIL.Image import Image

Bounds = tuple[float | None, float | None]
"""Least and greatest value, both included; None: no bound."""


@dataclass(frozen=True)
class View:
    """The decoded image of a sample, or the reason why it cannot be decoded."""

    image: "Image | None"
    fault: str | None = None

    @cached_property
    def small(self) -> "Image | None":
        """A small RGB copy, 128 x 128."""
        if self.image is None:
            return None
        from PIL.Image import Resampling

        # A palette or an alpha channel cannot be averaged.
        image = self.image if self.image.mode in ("L", "RGB") else self.image.convert("RGB")
        return image.resize((128, 128), Resampling.BILINEAR, reducing_gap=3.0).convert("RGB")


def look(data: bytes) -> View:
    """Decode a JPEG, PNG or WebP image."""
    return View(*decode(data))


class Rule(Config, ABC):
    """A rule that a kept sample fulfils: each of its values lies within its bounds."""

    kind: str
    """Name of the rule."""

    @abstractmethod
    def measure(self, sample: Sample, view: View) -> dict[str, float]:
        """Return the sample's values by name. Leave out a value that the rule does not apply to: it breaks nothing.

        A value that should be there and is not is NaN, which lies within no bounds.
        """

    @abstractmethod
    def bounds(self) -> dict[str, Bounds]:
        """Return the bounds of each value by its name."""

    def reason(self, value: str, low: bool) -> str:
        """Return the name under which a sample is dropped whose `value` is too low, or too high."""
        return self.kind

    def broken(self, values: Mapping[str, float]) -> str | None:
        """Return the name under which a sample with these values is dropped, or None if it fulfils the rule."""
        for name, (least, greatest) in self.bounds().items():
            if name not in values:
                continue
            if least is not None and not values[name] >= least:
                return self.reason(name, low=True)
            if greatest is not None and not values[name] <= greatest:
                return self.reason(name, low=False)
        return None


def original_size(sample: Sample, view: View) -> tuple[int, int]:
    """Return width and height in pixels before the download resized the image; the image's own if not recorded."""
    if size := sample.recorded_size:
        return size[1], size[0]
    return view.image.size if view.image else (0, 0)
