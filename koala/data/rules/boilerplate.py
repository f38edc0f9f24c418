"""The rule `boilerplate`."""

import re
from typing import Literal

from pydantic import Field

from koala.data.rules.base import Bounds, Rule, View
from koala.data.shards import Sample

_PATTERNS = tuple(
    re.compile(pattern, re.IGNORECASE | re.VERBOSE)
    for pattern in (
        # A file's name, anywhere.
        r"\S\.(?:jpe?g|png|gif|webp|bmp|tiff?|heic|avif|svg|psd)\b",
        # What cameras, phones and programs call a picture.
        r"^\W*(?:img|dscn?|dscf|dsc|pxl|mvimg|gopr|dji|pict|scan|screen[ _-]?shot|wp|vlcsnap|whatsapp[ ]image|image|photo|picture)"
        r"[ _-]*\d{2,}[\d _.:-]*(?:[ap]m)?\W*$",
        # The title of a picture that has none.
        r"^\W*(?:untitled|no[ ](?:title|caption|description|name|alt(?:[ ]text)?)|default|placeholder|thumbnail|null|none|undefined"
        r"|n/?a|(?:featured|main|product|header|blog|post|profile|cover|preview)?[ ]?(?:image|img|photo|picture|pic|avatar|logo"
        r"|banner|slide|icon))[\W\d_]*$",
        # Agencies, and what they write below each picture.
        r"\b(?:royalty[ -]free|stock[ -](?:photo|image|picture|vector|illustration|footage|video)(?:s|graphy)?)\b",
        r"\b(?:shutterstock|getty[ ]?images|istock(?:photo)?|alamy|dreamstime|depositphotos|123rf|vectorstock|adobe[ ]stock"
        r"|bigstock(?:photo)?)\b",
        # Shops and pages.
        r"\b(?:buy[ ]now|add[ ]to[ ](?:cart|basket|wish[ ]?list)|free[ ](?:shipping|delivery|download)|(?:out[ ]of|in)[ ]stock"
        r"|sold[ ]out|best[ ]price|\d+[ ]?%[ ]off|click[ ](?:here|to[ ]\w+|for[ ]\w+)|read[ ]more|learn[ ]more|view[ ]larger"
        r"|(?:image|photo|picture)[ ](?:not[ ](?:available|found)|coming[ ]soon|may[ ]contain))\b",
        r"\ball[ ]rights[ ]reserved\b|\N{COPYRIGHT SIGN}|\(c\)[ ]?(?:19|20)\d\d",
    )
)
"""Each is tried on every caption: no pattern may take more than linear time."""


class Boilerplate(Rule):
    """What programs, agencies and shops write in place of a caption. Drops as `boilerplate`."""

    kind: Literal["boilerplate"] = "boilerplate"
    """Name of the rule."""
    at_most: int = Field(default=0, ge=0)
    """Kinds of boilerplate."""

    def measure(self, sample: Sample, view: View) -> dict[str, float]:
        """Return `boilerplate`, in kinds."""
        return {"boilerplate": sum(pattern.search(sample.caption) is not None for pattern in _PATTERNS)}

    def bounds(self) -> dict[str, Bounds]:
        """Return the bounds of `boilerplate`."""
        return {"boilerplate": (None, self.at_most)}
