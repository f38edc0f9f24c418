"""CMMD: how far a model's images are from its teacher's, as two sets, by CLIP's embeddings."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from koala.evaluate.extractors import Clip
from koala.evaluate.metrics.base import Column, ModelMetric
from koala.evaluate.prompts import Prompt

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_SIGMA = 10.0  # of the kernel
_SCALE = 1000.0


class Cmmd(ModelMetric):
    """Maximum mean discrepancy of CLIP's image embeddings to the teacher's images of the same prompts: `cmmd`."""

    columns: ClassVar[Mapping[str, Column]] = {"cmmd": Column("CMMD to teacher", "{:.3f}", of_set=True)}

    kind: Literal["cmmd"] = "cmmd"
    """Name of the kind."""

    def measure_set(
        self, images: "Sequence[Image]", prompts: Sequence[Prompt], reference: "Sequence[Image] | None"
    ) -> dict[str, float]:
        """Return `cmmd`, or nothing for the teacher itself. Raises KoalaError where the CLIP model cannot be loaded."""
        if reference is None:
            return {}
        clip = Clip(self.model, self.revision)
        return {"cmmd": discrepancy(clip.images(images), clip.images(reference))}


def discrepancy(one: "np.ndarray", other: "np.ndarray") -> float:
    """Return 1000 x the squared MMD of unit vectors N x D and M x D by a Gaussian kernel of sigma 10 (Jayasumana et al. 2024, 4.1).

    The biased estimate, as theirs: a vector counts beside itself.
    """

    def kernel(a: "np.ndarray", b: "np.ndarray") -> float:
        import numpy as np

        squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
        return float(np.exp(-squares / (2 * _SIGMA**2)).mean())

    one, other = one.astype(float), other.astype(float)
    return _SCALE * (kernel(one, one) + kernel(other, other) - 2 * kernel(one, other))
