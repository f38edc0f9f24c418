"""What tells the same picture from another: a difference hash, a colour thumbnail, and keys by which the like are neighbours."""

from functools import lru_cache

import numpy as np
from PIL import Image

SIDE = 8
"""Side of a colour thumbnail, pixels."""
TABLES = 12
"""Hashes of a thumbnail or an embedding: the more, the fewer pairs are missed."""


def dhash(image: Image.Image) -> int:
    """Compute a 64-bit difference hash: whether each grey value of a 9 x 8 thumbnail is below its right neighbour's.

    Source: N. Krawetz, "Kind of Like That" (2013).
    """
    pixels = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))
    return int.from_bytes(np.packbits(pixels[:, :-1] < pixels[:, 1:]).tobytes())


def thumbnail(image: Image.Image) -> bytes:
    """Return `SIDE` x `SIDE` RGB pixels."""
    return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX).tobytes()


@lru_cache
def _planes(width: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((width, 64 * TABLES)).astype(np.float32)


def plane_hashes(vectors: np.ndarray) -> np.ndarray:
    """Return `TABLES` 64-bit hashes of each vector: n x d numbers to n x TABLES uint64.

    A bit says on which side of a random plane a vector lies: two vectors at an angle a differ in a share a / pi of them.
    Source: M. Charikar, "Similarity estimation techniques from rounding algorithms" (2002).
    """
    sides = vectors.astype(np.float32) @ _planes(vectors.shape[1]) > 0
    return np.packbits(sides, axis=1).view(">u8").astype(np.uint64)


def look_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """Return the hashes of thumbnails, n x 192: of their pattern, not of their brightness and contrast."""
    return plane_hashes(thumbnails - thumbnails.mean(axis=1, dtype=np.float32, keepdims=True))
