"""The rule `control`."""

import re
from typing import Literal

from pydantic import Field

from koala.data.rules.base import Bounds, Rule, View
from koala.data.shards import Sample

_UNSEEN = re.compile(
    # C0 and C1 but for white space; zero-width space and no-break space; marks, embeddings, overrides and isolates of bidi text;
    # private use; surrogates; the replacement character that broken text was decoded to.
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff"
    "\ue000-\uf8ff\ud800-\udfff\ufffd]"
)


class Control(Rule):
    """Characters that nobody sees: control characters, direction marks, remains of broken text. Drops as `control`."""

    kind: Literal["control"] = "control"
    """Name of the rule."""
    at_most: int = Field(default=0, ge=0)
    """Characters."""

    def measure(self, sample: Sample, view: View) -> dict[str, float]:
        """Return `control`, in characters."""
        return {"control": len(_UNSEEN.findall(sample.caption))}

    def bounds(self) -> dict[str, Bounds]:
        """Return the bounds of `control`."""
        return {"control": (None, self.at_most)}
