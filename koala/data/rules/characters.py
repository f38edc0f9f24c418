"""The rule `characters`."""

from typing import Literal

from pydantic import Field

from koala.data.rules.base import Bounds, Rule, View
from koala.data.shards import Sample


class Characters(Rule):
    """Length of the caption. Drops as `short_caption` or `long_caption`."""

    kind: Literal["characters"] = "characters"
    """Name of the rule."""
    at_least: int = Field(default=1, ge=0)
    """Characters."""
    at_most: int = Field(default=2000, ge=1)
    """Characters."""

    def measure(self, sample: Sample, view: View) -> dict[str, float]:
        """Return `characters`."""
        return {"characters": len(sample.caption)}

    def bounds(self) -> dict[str, Bounds]:
        """Return the bounds of `characters`."""
        return {"characters": (self.at_least, self.at_most)}

    def reason(self, value: str, low: bool) -> str:
        """Return `short_caption` or `long_caption`."""
        return "short_caption" if low else "long_caption"
