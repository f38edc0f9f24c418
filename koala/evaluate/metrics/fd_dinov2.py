"""FD-DINOv2: how far a model's images are from its teacher's, as two sets, by DINOv2's features."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from koala.evaluate.extractors import dino
from koala.evaluate.metrics.base import Column, ModelMetric, SetFigure
from koala.evaluate.prompts import Prompt

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


class FdDinov2(ModelMetric):
    """The Frechet distance of DINOv2's features to the teacher's images of the same prompts: `fd_dinov2` (Stein et al. 2023).

    It falls with the number of images: compare it at one count only. It has no interval, since a resample, which repeats
    images, has the distance of fewer.
    """

    columns: ClassVar[Mapping[str, Column]] = {
        "fd_dinov2": Column("FD to teacher ({model}, {count} images)", "{:.1f}", interval=False)
    }

    kind: Literal["fd_dinov2"] = "fd_dinov2"
    """Name of the kind."""

    def measure_set(
        self, images: "Sequence[Image]", prompts: Sequence[Prompt], reference: "Sequence[Image] | None"
    ) -> dict[str, SetFigure]:
        """Return `fd_dinov2`, or nothing for the teacher itself. Raises KoalaError where the model cannot be loaded."""
        if reference is None:
            return {}
        extractor = dino(self.model, self.revision)
        return {"fd_dinov2": SetFigure(frechet_distance(extractor.images(images), extractor.images(reference)))}


def frechet_distance(one: "np.ndarray", other: "np.ndarray") -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features N x D and M x D (Heusel et al. 2017, equation 6).

    The trace of the root is that of C1^(1/2) C2 C1^(1/2), whose eigenvalues are real.
    """
    import numpy as np

    means = one.mean(axis=0, dtype=float), other.mean(axis=0, dtype=float)
    first, second = (np.atleast_2d(np.cov(features.astype(float), rowvar=False)) for features in (one, other))
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(0, None)) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0, None)).sum()
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * shared)
