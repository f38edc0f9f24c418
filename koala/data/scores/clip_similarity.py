"""Similarity of an image and its caption: the cosine of their embeddings (Hessel et al. 2021, CLIPScore, unscaled)."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from koala.data.scores.base import EmbeddingScorer, Texts

if TYPE_CHECKING:
    import numpy as np


class ClipSimilarity(EmbeddingScorer):
    """Cosine of the embeddings of image and caption, -1 to 1; null where there is no caption."""

    kind: Literal["clip_similarity"] = "clip_similarity"
    """Name of the score."""

    def load(self, embedder: Texts) -> "Callable[[np.ndarray, Sequence[str]], np.ndarray]":
        """Return the function that gives the cosines. A caption is truncated to the tokenizer's length."""
        import numpy as np

        def cosines(embeddings: np.ndarray, captions: Sequence[str]) -> np.ndarray:
            found = (embeddings * embedder.texts(captions)).sum(axis=1)
            empty = np.array([not caption.strip() for caption in captions])
            return np.where(empty, np.nan, found)

        return cosines
