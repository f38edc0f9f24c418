"""Text within images (watermarks, captions, screenshots), read by RapidOCR (PP-OCR), which carries its models.

Only strings of three letters or more count: the detector alone takes bricks and fences for text.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from koala.data.scores.base import ImageScorer

if TYPE_CHECKING:
    from PIL.Image import Image

_LETTERS = 3

Strings = list[float]
"""The strings in an image: the share of its area that each one's box covers."""


class _Text(ImageScorer):
    packages: ClassVar[tuple[str, ...]] = ("rapidocr", "onnxruntime")
    side: int = Field(default=640, ge=64)
    """Pixels to which the longer side of a larger image is reduced before it is read. 320 takes a third of the time, and misses
    small print."""


class TextArea(_Text):
    """Share of the image's area that is covered by text, 0 to 1, on the CPU."""

    kind: Literal["text_area"] = "text_area"
    """Name of the score."""

    def load(self) -> "Callable[[Sequence[Image]], Sequence[float]]":
        """Return the reader's shares."""
        read = _reader(self.side)
        return lambda images: [min(sum(strings), 1.0) for strings in read(images)]


class TextStrings(_Text):
    """Strings of text in the image, on the CPU. A watermark is one or a few."""

    kind: Literal["text_strings"] = "text_strings"
    """Name of the score."""

    def load(self) -> "Callable[[Sequence[Image]], Sequence[float]]":
        """Return the reader's counts."""
        read = _reader(self.side)
        return lambda images: [float(len(strings)) for strings in read(images)]


@cache
def _reader(side: int) -> "Callable[[Sequence[Image]], list[Strings]]":
    """Return a reader of images. Asked again for the same series (compared by identity), it does not read again."""
    import numpy as np
    from rapidocr import RapidOCR

    engine = RapidOCR(params={"Global.log_level": "critical"})
    last: list[tuple[Sequence[Image], list[Strings]]] = []

    def strings(image: "Image") -> Strings:
        reduced = image.copy()
        reduced.thumbnail((side, side))
        read: Any = engine(np.asarray(reduced)[:, :, ::-1])
        found = zip(read.txts or (), read.boxes if read.boxes is not None else (), strict=True)
        pixels = reduced.width * reduced.height
        return [_area(box) / pixels for text, box in found if sum(map(str.isalpha, text)) >= _LETTERS]

    def read(images: "Sequence[Image]") -> list[Strings]:
        if not last or last[0][0] is not images:
            last[:] = [(images, [strings(image) for image in images])]
        return last[0][1]

    return read


def _area(box: Sequence[Sequence[float]]) -> float:
    """Return the area of a polygon by the shoelace formula."""
    corners = [(float(x), float(y)) for x, y in box]
    return abs(sum(x * v - u * y for (x, y), (u, v) in zip(corners, corners[1:] + corners[:1], strict=True))) / 2
