"""Agreement with the teacher: DINOv2's cosine between images of the same prompts and seeds."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from koala.evaluate.extractors import dino
from koala.evaluate.metrics.base import Column, ModelMetric
from koala.evaluate.prompts import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image


class DinoCosine(ModelMetric):
    """The cosine of DINOv2's features of a student's image and of the teacher's: `dino_cosine`."""

    columns: ClassVar[Mapping[str, Column]] = {"dino_cosine": Column("DINOv2 cosine to teacher", "{:.3f}")}

    kind: Literal["dino_cosine"] = "dino_cosine"
    """Name of the kind."""

    def measure(
        self, images: "Sequence[Image]", prompts: Sequence[Prompt], reference: "Sequence[Image] | None"
    ) -> dict[str, list[float]]:
        """Return `dino_cosine`, or nothing for the teacher itself. Raises KoalaError where the model cannot be loaded."""
        if reference is None:
            return {}
        import numpy as np

        extractor = dino(self.model, self.revision)
        ours, theirs = extractor.images(images), extractor.images(reference)
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        return {"dino_cosine": ((ours * theirs).sum(axis=1) / lengths).tolist()}
