"""The rule `size`."""

from typing import Literal

from pydantic import Field

from koala.data.rules.base import Bounds, Rule, View, original_size
from koala.data.shards import Sample


class Size(Rule):
    """Shorter side of the original image. Drops as `too_small`."""

    kind: Literal["size"] = "size"
    """Name of the rule."""
    at_least: int = Field(gt=0)
    """Pixels, before the download resized the image."""

    def measure(self, sample: Sample, view: View) -> dict[str, float]:
        """Return `size`, in pixels."""
        return {"size": min(original_size(sample, view))}

    def bounds(self) -> dict[str, Bounds]:
        """Return the bounds of `size`."""
        return {"size": (self.at_least, None)}

    def reason(self, value: str, low: bool) -> str:
        """Return `too_small`."""
        return "too_small"
