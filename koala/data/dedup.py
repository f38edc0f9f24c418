"""Duplicates among samples: by image bytes, by URL and, if enabled, by perceptual hash."""

import hashlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from PIL import Image


class Duplicates:
    """The samples kept so far. Among duplicates, the first in table order is kept."""

    def __init__(self, near_bits: int | None) -> None:
        """Detect near duplicates too if `near_bits` is not None (see NearDuplicates)."""
        self._images: set[bytes] = set()
        self._urls: set[bytes] = set()
        self._near = NearDuplicates(near_bits) if near_bits is not None else None

    def add(self, row: Mapping[str, Any]) -> str | None:
        """Remember a judged row (sha256, url, dhash). If it repeats an earlier one, return the reason to drop it."""
        url = hashlib.blake2b(row["url"].encode(), digest_size=16).digest()
        if row["sha256"] in self._images:
            return "duplicate_image"
        if row["url"] and url in self._urls:
            return "duplicate_url"
        if self._near and not self._near.add(row["dhash"]):
            return "near_duplicate"
        self._images.add(row["sha256"])
        self._urls.add(url)
        return None


class NearDuplicates:
    """A set of 64-bit hashes of which no two differ in `bits` bits or fewer.

    A hash is cut into bits + 1 bands. Two hashes that differ in at most `bits` bits are equal in at least one band, so
    only hashes that share a band are compared.
    """

    def __init__(self, bits: int) -> None:
        """Start with an empty set."""
        edges = [64 * index // (bits + 1) for index in range(bits + 2)]
        self._bits = bits
        self._bands = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
        self._known: list[dict[int, list[int]]] = [{} for _ in self._bands]

    def add(self, value: int) -> bool:
        """Add a hash and return True; return False and add nothing if a near one is in the set."""
        parts = [value >> low & mask for low, mask in self._bands]
        for part, known in zip(parts, self._known, strict=True):
            if any((value ^ other).bit_count() <= self._bits for other in known.get(part, ())):
                return False
        for part, known in zip(parts, self._known, strict=True):
            known.setdefault(part, []).append(value)
        return True


def dhash(image: Image.Image) -> int:
    """Compute a 64-bit difference hash: whether each grey value of a 9 x 8 thumbnail is below its right neighbour's.

    Source: N. Krawetz, "Kind of Like That" (2013).
    """
    pixels = image.convert("L").resize((9, 8), Image.Resampling.LANCZOS).tobytes()
    value = 0
    for row in range(0, 72, 9):
        for left, right in zip(pixels[row : row + 8], pixels[row + 1 : row + 9], strict=True):
            value = value << 1 | (left < right)
    return value
