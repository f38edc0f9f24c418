"""The rule `urls`."""

import re
from typing import Literal

from pydantic import Field

from koala.data.rules.base import Bounds, Rule, View
from koala.data.shards import Sample

_URL = re.compile(
    r"""
    \b(?:https?|ftp)://\S+ | \bwww\.\S+
    # Without a scheme, domains that are no words: "a photo.in the park" lacks a space and is no address.
    | (?<![\w@.-])(?:[a-z0-9](?:[a-z0-9-]{0,62})\.)+(?:com|net|org|info|biz|edu|gov|co\.[a-z]{2}|com\.[a-z]{2})\b
    """,
    re.IGNORECASE | re.VERBOSE,
)


class Urls(Rule):
    """Web addresses in the caption, with or without their scheme. Drops as `urls`."""

    kind: Literal["urls"] = "urls"
    """Name of the rule."""
    at_most: int = Field(default=0, ge=0)
    """Addresses."""

    def measure(self, sample: Sample, view: View) -> dict[str, float]:
        """Return `urls`, in addresses."""
        return {"urls": len(_URL.findall(sample.caption))}

    def bounds(self) -> dict[str, Bounds]:
        """Return the bounds of `urls`."""
        return {"urls": (None, self.at_most)}
