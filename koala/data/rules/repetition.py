"""The rule `repetition`."""

from itertools import groupby
from typing import Literal

from pydantic import Field

from koala.data.rules.base import Bounds, Rule, View
from koala.data.shards import Sample


class Repetition(Rule):
    """Words and phrases that come again and again. Drops as `repetition`."""

    kind: Literal["repetition"] = "repetition"
    """Name of the rule."""
    at_most: float = Field(default=0.3, ge=0, le=1)
    """Share of the caption's runs of three words that it has had before."""
    run: int = Field(default=2, ge=1)
    """Times that a word may follow itself at once: `sale sale` are two."""

    def measure(self, sample: Sample, view: View) -> dict[str, float]:
        """Return `repetition` (a share) and `word_run` (words)."""
        words = sample.caption.casefold().split()
        triples = list(zip(words, words[1:], words[2:], strict=False))
        longest = max((len(list(same)) for _, same in groupby(words)), default=0)
        return {"repetition": 1 - len(set(triples)) / len(triples) if triples else 0, "word_run": longest}

    def bounds(self) -> dict[str, Bounds]:
        """Return the bounds of both values."""
        return {"repetition": (None, self.at_most), "word_run": (None, self.run)}
