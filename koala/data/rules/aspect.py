"""The rule `aspect`."""

from typing import Literal

from pydantic import Field

from koala.data.rules.base import Bounds, Rule, View, original_size
from koala.data.shards import Sample


class Aspect(Rule):
    """Longer side over shorter side. Drops as `aspect`."""

    kind: Literal["aspect"] = "aspect"
    """Name of the rule."""
    at_most: float = Field(default=2.0, ge=1)
    """Ratio of the sides."""

    def measure(self, sample: Sample, view: View) -> dict[str, float]:
        """Return `aspect`; nothing for an image without pixels."""
        short, long = sorted(original_size(sample, view))
        return {"aspect": long / short} if short else {}

    def bounds(self) -> dict[str, Bounds]:
        """Return the bounds of `aspect`."""
        return {"aspect": (None, self.at_most)}
