"""The rule `words`."""

from typing import Literal

from pydantic import Field

from koala.data.rules.base import Bounds, Rule, View
from koala.data.shards import Sample


class Words(Rule):
    """Words in the caption. Drops as `few_words` or `many_words`."""

    kind: Literal["words"] = "words"
    """Name of the rule."""
    at_least: int = Field(default=3, ge=1)
    """Words, separated by white space."""
    at_most: int = Field(default=300, ge=1)
    """Words, separated by white space."""

    def measure(self, sample: Sample, view: View) -> dict[str, float]:
        """Return `words`."""
        return {"words": count_words(sample.caption)}

    def bounds(self) -> dict[str, Bounds]:
        """Return the bounds of `words`."""
        return {"words": (self.at_least, self.at_most)}

    def reason(self, value: str, low: bool) -> str:
        """Return `few_words` or `many_words`."""
        return "few_words" if low else "many_words"


def count_words(caption: str) -> int:
    """Count words separated by white space."""
    return len(caption.split())
