"""The rule `markup`."""

import re
from typing import Literal

from pydantic import Field

from koala.data.rules.base import Bounds, Rule, View
from koala.data.shards import Sample

_MARKUP = re.compile(
    r"""
    </?[a-z][^<>]{0,200}>                                          # a tag of HTML
    | &(?:\#\d{1,7}|\#x[0-9a-f]{1,6}|[a-z]{2,8}\d{0,2});           # an entity
    | \[/?(?:b|i|u|url|img|quote|code|size|color)(?:=[^\]]{0,200})?\]  # BBCode
    | \]\((?:https?:|/)                                            # a link of Markdown
    | \{\{ | \}\} | \[\[ | \]\]                                    # a template
    """,
    re.IGNORECASE | re.VERBOSE,
)


class Markup(Rule):
    """Tags, entities and other markup in the caption. Drops as `markup`."""

    kind: Literal["markup"] = "markup"
    """Name of the rule."""
    at_most: int = Field(default=0, ge=0)
    """Pieces of markup."""

    def measure(self, sample: Sample, view: View) -> dict[str, float]:
        """Return `markup`, in pieces."""
        return {"markup": len(_MARKUP.findall(sample.caption))}

    def bounds(self) -> dict[str, Bounds]:
        """Return the bounds of `markup`."""
        return {"markup": (None, self.at_most)}
