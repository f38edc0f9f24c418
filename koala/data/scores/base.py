"""The bases of every score: one of the image, one of its embedding."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, Protocol

from koala.config import Config
from koala.errors import KoalaError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


class Texts(Protocol):
    """An embedder of captions."""

    width: int
    """Numbers of an embedding."""

    def texts(self, captions: Sequence[str]) -> "np.ndarray":
        """Embed captions as unit vectors, N x `width`."""


class Scorer(Config, ABC):
    """A number for each sample. Its kinds are subclasses, one file each."""

    packages: ClassVar[tuple[str, ...]] = ()
    """Modules of the extra `scores` that it imports."""

    kind: str
    """Name of the score, and of its column."""

    def check(self) -> None:
        """Raise KoalaError where one of its packages is not installed."""
        for package in self.packages:
            if find_spec(package) is None:
                raise KoalaError(
                    f"score.scorers.{self.kind} needs {package}: `pip install 'koala-distill[scores]'`, or leave the score out"
                )


class ImageScorer(Scorer):
    """A score that is computed from the image alone."""

    @abstractmethod
    def load(self) -> "Callable[[Sequence[Image]], Sequence[float]]":
        """Load its model. Return a function of RGB images that gives a number for each."""


class EmbeddingScorer(Scorer):
    """A score that is computed from the image's embedding and its caption."""

    @abstractmethod
    def load(self, embedder: Texts) -> "Callable[[np.ndarray, Sequence[str]], np.ndarray]":
        """Load its model.

        Return a function of embeddings (N x D unit vectors, float32) and captions that gives N numbers, NaN where there is none.
        """
