"""The rule `personal`."""

import re
from typing import Literal

from pydantic import Field

from koala.data.rules.base import Bounds, Rule, View
from koala.data.shards import Sample

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[a-z]{2,24}\b", re.IGNORECASE)
_PHONE = re.compile(
    r"""
    (?<![\w+.-])\+[1-9](?:[ ().-]{0,2}\d){7,13}(?![\w-])                   # with the country's code
    | (?<![\w.-])\(?[2-9]\d\d\)?[ .-]{1,2}[2-9]\d\d[.-]\d{4}(?![\w-])      # North America's form
    | \b(?:tel|phone|telephone|call|fax|whatsapp|mobile|cell)\b[ .:]{0,3}(?:(?:us|at|on)[ ])?
      \(?\d(?:[ ().-]{0,2}\d){6,13}                                        # after a word that announces it
    """,
    re.IGNORECASE | re.VERBOSE,
)


class Personal(Rule):
    """E-mail addresses and phone numbers in the caption. Drops as `personal`.

    A number is a phone number only by its form or the word before it: dates, sizes, prices and ISBNs are none. Names are no
    concern of this rule: captions of works and places are full of them.
    """

    kind: Literal["personal"] = "personal"
    """Name of the rule."""
    at_most: int = Field(default=0, ge=0)
    """Addresses and numbers."""

    def measure(self, sample: Sample, view: View) -> dict[str, float]:
        """Return `personal`: addresses and numbers."""
        return {"personal": sum(len(pattern.findall(sample.caption)) for pattern in (_EMAIL, _PHONE))}

    def bounds(self) -> dict[str, Bounds]:
        """Return the bounds of `personal`."""
        return {"personal": (None, self.at_most)}
