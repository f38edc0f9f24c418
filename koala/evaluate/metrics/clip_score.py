"""CLIP score: how well images fit their prompts, by CLIP's embeddings."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from koala.evaluate.extractors import clip
from koala.evaluate.metrics.base import Column, ModelMetric
from koala.evaluate.prompts import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image


class ClipScore(ModelMetric):
    """100 x the cosine of CLIP's embeddings of image and prompt, never below 0: `clip_score` (Hessel et al. 2021, w = 100)."""

    # The spread is the one at which 100 prompts see a loss of 2 % with a power of 0.80, and 200 with 0.97. It is assumed:
    # measure it on a student of yours, and state that.
    columns: ClassVar[Mapping[str, Column]] = {
        "clip_score": Column("CLIP score ({model})", "{:.2f}", of_teacher=True, spread=0.08)
    }

    kind: Literal["clip_score"] = "clip_score"
    """Name of the kind."""

    def measure(
        self, images: "Sequence[Image]", prompts: Sequence[Prompt], reference: "Sequence[Image] | None"
    ) -> dict[str, list[float]]:
        """Return `clip_score`. Raises KoalaError where the CLIP model cannot be loaded."""
        cosines = clip(self.model, self.revision).cosines(images, [prompt.text for prompt in prompts])
        return {"clip_score": (100 * cosines.clip(0, None)).tolist()}
