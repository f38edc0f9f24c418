"""The rule `ascii`."""

from typing import Literal

from pydantic import Field

from koala.data.rules.base import Bounds, Rule, View
from koala.data.shards import Sample


class Ascii(Rule):
    """Share of ASCII characters in the caption. Drops as `not_ascii`."""

    kind: Literal["ascii"] = "ascii"
    """Name of the rule."""
    at_least: float = Field(ge=0, le=1)
    """Share of the characters, 0 to 1."""

    def measure(self, sample: Sample, view: View) -> dict[str, float]:
        """Return `ascii`; nothing for an empty caption."""
        caption = sample.caption
        return {"ascii": sum(map(str.isascii, caption)) / len(caption)} if caption else {}

    def bounds(self) -> dict[str, Bounds]:
        """Return the bounds of `ascii`."""
        return {"ascii": (self.at_least, None)}

    def reason(self, value: str, low: bool) -> str:
        """Return `not_ascii`."""
        return "not_ascii"
