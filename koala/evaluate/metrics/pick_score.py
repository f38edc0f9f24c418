"""PickScore: how people would judge an image for its prompt, by a CLIP model trained on their choices."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from koala.evaluate.extractors import clip
from koala.evaluate.metrics.base import Column, ModelMetric
from koala.evaluate.prompts import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image


class PickScore(ModelMetric):
    """The model's scaled cosine of image and prompt: `pick_score` (Kirstain et al. 2023, equation 1)."""

    # The spread is the one at which 50 prompts see a loss of 2 % with a power of 0.99. It is assumed.
    columns: ClassVar[Mapping[str, Column]] = {
        "pick_score": Column("PickScore", "{:.2f}", of_teacher=True, spread=0.035)
    }

    kind: Literal["pick_score"] = "pick_score"
    """Name of the kind."""

    def measure(
        self, images: "Sequence[Image]", prompts: Sequence[Prompt], reference: "Sequence[Image] | None"
    ) -> dict[str, list[float]]:
        """Return `pick_score`. Raises KoalaError where the model cannot be loaded."""
        extractor = clip(self.model, self.revision)
        cosines = extractor.cosines(images, [prompt.text for prompt in prompts])
        return {"pick_score": (extractor.scale * cosines).tolist()}
