"""Filter rules: what one sample must fulfil by itself to be kept.

A new rule is a subclass of `Rule`, named in the union of koala/params.py. Keep this module light to import: it is read
with params.yaml.
"""

import io
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from koala.config import Config
from koala.data.shards import Sample

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class View:
    """The decoded image of a sample, or the reason why it cannot be decoded."""

    image: "Image | None"
    fault: str | None = None


def look(data: bytes) -> View:
    """Decode a JPEG, PNG or WebP image. Refuse one with more pixels than Pillow considers safe."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
            image.load()
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            return View(None, "decompression_bomb")
        except Exception:  # Pillow's decoders raise anything on broken bytes
            return View(None, "undecodable")
    return View(image)


def broken_rule(sample: Sample, view: View, rules: Iterable["Rule"]) -> str | None:
    """Return the name under which the sample is dropped, or None if it is kept.

    `undecodable` and `decompression_bomb` always apply, before `rules`.
    """
    checks = chain((_undecodable,), (rule.broken for rule in rules))
    return next((name for check in checks if (name := check(sample, view))), None)


def _undecodable(sample: Sample, view: View) -> str | None:
    return view.fault


class Rule(Config, ABC):
    """A rule that a kept sample fulfils."""

    kind: str
    """Name of the rule."""

    @abstractmethod
    def broken(self, sample: Sample, view: View) -> str | None:
        """Return the name under which the sample is dropped, or None if it fulfils the rule."""


class Size(Rule):
    """Shorter side of the original image. Drops as `too_small`."""

    kind: Literal["size"] = "size"
    """Name of the rule."""
    at_least: int = Field(ge=0)
    """Pixels, before the download resized the image."""

    def broken(self, sample: Sample, view: View) -> str | None:
        """Return `too_small` or None."""
        return "too_small" if min(_original_size(sample, view)) < self.at_least else None


class Aspect(Rule):
    """Longer side over shorter side. Drops as `aspect`."""

    kind: Literal["aspect"] = "aspect"
    """Name of the rule."""
    at_most: float = Field(default=2.0, ge=1)
    """Ratio of the sides."""

    def broken(self, sample: Sample, view: View) -> str | None:
        """Return `aspect` or None."""
        short, long = sorted(_original_size(sample, view))
        return "aspect" if long > self.at_most * short else None


class Words(Rule):
    """Words in the caption. Drops as `few_words` or `many_words`."""

    kind: Literal["words"] = "words"
    """Name of the rule."""
    at_least: int = Field(default=3, ge=1)
    """Words, separated by white space."""
    at_most: int = Field(default=300, ge=1)
    """Words, separated by white space."""

    def broken(self, sample: Sample, view: View) -> str | None:
        """Return `few_words`, `many_words` or None."""
        words = count_words(sample.caption)
        if words < self.at_least:
            return "few_words"
        return "many_words" if words > self.at_most else None


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

    def broken(self, sample: Sample, view: View) -> str | None:
        """Return `blocklist` or None."""
        return "blocklist" if any(re.search(pattern, sample.caption) for pattern in self.patterns) else None


class Ascii(Rule):
    """Share of ASCII characters in the caption. Drops as `not_ascii`."""

    kind: Literal["ascii"] = "ascii"
    """Name of the rule."""
    at_least: float = Field(ge=0, le=1)
    """Share of the characters, 0 to 1."""

    def broken(self, sample: Sample, view: View) -> str | None:
        """Return `not_ascii` or None."""
        share = sum(character.isascii() for character in sample.caption) / max(len(sample.caption), 1)
        return "not_ascii" if share < self.at_least else None


class Scores(Rule):
    """Score columns of the table. Drops as `score.COLUMN`. A score that is missing or not a number breaks the rule."""

    kind: Literal["scores"] = "scores"
    """Name of the rule."""
    at_least: dict[str, float] = Field(default_factory=dict)
    """Least value of each column."""
    at_most: dict[str, float] = Field(default_factory=dict)
    """Greatest value of each column."""

    def broken(self, sample: Sample, view: View) -> str | None:
        """Return `score.COLUMN` for the first column out of bounds, or None."""
        for column, least in self.at_least.items():
            if not _number(sample, column) >= least:
                return f"score.{column}"
        for column, greatest in self.at_most.items():
            if not _number(sample, column) <= greatest:
                return f"score.{column}"
        return None


def count_words(caption: str) -> int:
    """Count words separated by white space."""
    return len(caption.split())


def _original_size(sample: Sample, view: View) -> tuple[int, int]:
    """Return width and height in pixels before the download resized the image; the image's own if not recorded."""
    width, height = sample.meta.get("original_width"), sample.meta.get("original_height")
    if width and height:
        return int(width), int(height)
    return view.image.size if view.image else (0, 0)


def _number(sample: Sample, column: str) -> float:
    value = sample.meta.get(column)
    return float(value) if isinstance(value, int | float) else float("nan")
