"""The rule `blocklist`."""

import re
from typing import Literal

from pydantic import field_validator

from koala.data.rules.base import Bounds, Rule, View
from koala.data.shards import Sample


class Blocklist(Rule):
    """Patterns that no caption may match. Drops as `blocklist`."""

    kind: Literal["blocklist"] = "blocklist"
    """Name of the rule."""
    patterns: tuple[str, ...]
    """Regular expressions, searched for anywhere in the caption."""

    @field_validator("patterns")
    @classmethod
    def _compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return patterns

    def measure(self, sample: Sample, view: View) -> dict[str, float]:
        """Return `blocklist`: how many of the patterns the caption matches."""
        return {"blocklist": sum(re.search(pattern, sample.caption) is not None for pattern in self.patterns)}

    def bounds(self) -> dict[str, Bounds]:
        """Return the bounds of `blocklist`."""
        return {"blocklist": (None, 0)}
