"""What tells the same picture from another: a difference hash, a colour thumbnail, and keys by which the like are neighbours."""

from functools import lru_cache

import numpy as np
from PIL import Image

SIDE = 16
"""Side of a colour thumbnail, pixels."""
TABLES = 12
"""Hashes of a thumbnail or an embedding: the more, the fewer pairs are missed."""
LOOK_HASHES = tuple(f"look_{table}" for table in range(TABLES))
EMBEDDING_HASHES = tuple(f"embedding_{table}" for table in range(TABLES))


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


def pattern(thumbnails: np.ndarray) -> np.ndarray:
    """Return thumbnails, n x d, less their means and at unit length, as float32. The cosine of two is their correlation.

    Neither brightness nor contrast of a picture count. A picture of one colour has no pattern, and is like no other.
    """
    centred = thumbnails - thumbnails.mean(axis=1, dtype=np.float32, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(centred / np.maximum(length, 1e-3), np.float32)
