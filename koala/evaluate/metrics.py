"""Metrics that need no reference data: pure functions of pictures and prompts."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

Embed = Callable[[Sequence[Image.Image]], np.ndarray]
"""Pictures to unit vectors, N x D."""


def agreement(images: Sequence[Image.Image], reference: Sequence[Image.Image]) -> float:
    """Mean PSNR in dB of pictures and the reference's of the same prompts and seeds: how closely a student follows."""
    errors = [np.mean((_array(image) - _array(other)) ** 2) for image, other in zip(images, reference, strict=True)]
    return float(np.mean([10 * np.log10(255**2 / max(error, 1e-3)) for error in errors]))


def clip_score(images: Sequence[Image.Image], prompts: Sequence[str], embed: Embed, embed_text: Callable) -> float:
    """100 x the mean cosine of picture and prompt, never below 0 (Hessel et al. 2021, with w = 100)."""
    cosines = (embed(images) * embed_text(prompts)).sum(axis=1)
    return float(100 * np.clip(cosines, 0, None).mean())


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float32)
