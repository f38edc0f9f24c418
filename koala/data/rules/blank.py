"""The rule `blank`."""

import math
from typing import Literal

from pydantic import Field

from koala.data.rules.base import Bounds, Rule, View
from koala.data.shards import Sample


class Blank(Rule):
    """Images that show nothing. Drops as `blank`."""

    kind: Literal["blank"] = "blank"
    """Name of the rule."""
    entropy: float = Field(default=0.1, ge=0, le=5)
    """Least entropy of the image's grey values, in bits, at 32 levels. A page with one line of text has about 0.2."""

    def measure(self, sample: Sample, view: View) -> dict[str, float]:
        """Return `entropy`, in bits."""
        if view.small is None:
            return {}
        grey = view.small.convert("L").histogram()
        counts = [sum(grey[level : level + 8]) for level in range(0, 256, 8)]
        total = sum(counts)
        return {"entropy": sum(count / total * math.log2(total / count) for count in counts if count)}

    def bounds(self) -> dict[str, Bounds]:
        """Return the bounds of `entropy`."""
        return {"entropy": (self.entropy, None)}
