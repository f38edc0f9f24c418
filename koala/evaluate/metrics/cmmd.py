"""CMMD: how far a model's images are from its teacher's, as two sets, by CLIP's embeddings."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from koala.evaluate.extractors import clip
from koala.evaluate.metrics.base import Column, ModelMetric, SetFigure
from koala.evaluate.prompts import Prompt
from koala.evaluate.statistics import Resamples

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_SIGMA = 10.0  # of the kernel
_SCALE = 1000.0
_RESAMPLES = 1000  # each takes images x images multiplications
_ROWS = 512  # of the matrix of pairs that are computed at once, in float64


class Cmmd(ModelMetric):
    """Maximum mean discrepancy of CLIP's image embeddings to the teacher's images of the same prompts: `cmmd`."""

    columns: ClassVar[Mapping[str, Column]] = {"cmmd": Column("CMMD to teacher ({model}, {count} images)", "{:.3f}")}

    kind: Literal["cmmd"] = "cmmd"
    """Name of the kind."""

    def measure_set(
        self, images: "Sequence[Image]", prompts: Sequence[Prompt], reference: "Sequence[Image] | None"
    ) -> dict[str, SetFigure]:
        """Return `cmmd`, or nothing for the teacher itself. Raises KoalaError where the CLIP model cannot be loaded."""
        if reference is None:
            return {}
        extractor = clip(self.model, self.revision)
        vectors = extractor.images(images), extractor.images(reference)
        return {"cmmd": discrepancy(*vectors, [prompt.text for prompt in prompts])}


def discrepancy(one: "np.ndarray", other: "np.ndarray", prompts: Sequence[str]) -> SetFigure:
    """Return 1000 x the squared MMD of unit vectors N x D by a Gaussian kernel of sigma 10 (Jayasumana et al. 2024, 4.1).

    The biased estimate, as theirs: a vector counts beside itself. A resample of the prompts repeats vectors, which adds to that
    bias: the draws are centred on the figure.

    Args:
        one: A vector of each image of a model.
        other: Those of the model that it is compared with, of the same prompts and seeds.
        prompts: The prompt of each of the N images.
    """
    import numpy as np

    # Of each pair of images, N x N: k(x, x') + k(y, y') - k(x, y') - k(y, x'), where x' and y' are of one prompt.
    pairs = np.empty((len(one), len(one)), dtype=np.float32)
    for first in range(0, len(one), _ROWS):
        rows = slice(first, first + _ROWS)
        within = _kernel(one[rows], one) + _kernel(other[rows], other)
        pairs[rows] = within - _kernel(one[rows], other) - _kernel(other[rows], one)
    value = pairs.mean(dtype=float)
    resamples, draws = Resamples(prompts), []
    for times in resamples.draws(_RESAMPLES):
        of_image = times[:, resamples.group].astype(np.float32)
        totals = (of_image @ pairs * of_image).sum(axis=1, dtype=float)
        draws.append(totals / of_image.sum(axis=1, dtype=float) ** 2)
    drawn = np.concatenate(draws)
    return SetFigure(float(_SCALE * value), _SCALE * (drawn - drawn.mean() + value))


def _kernel(one: "np.ndarray", other: "np.ndarray") -> "np.ndarray":
    """Return the Gaussian kernel of each pair of unit vectors, N x M."""
    import numpy as np

    kernel: np.ndarray = np.exp((one.astype(float) @ other.T.astype(float) - 1) / _SIGMA**2)
    return kernel
