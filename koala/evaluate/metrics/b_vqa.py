"""B-VQA: whether an image shows what its prompt names, by questions about it."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from koala.evaluate.extractors import questions
from koala.evaluate.metrics.base import Column, ModelMetric
from koala.evaluate.prompts import Prompt, PromptSet

if TYPE_CHECKING:
    from PIL.Image import Image

_MOST = 8  # chunks of a prompt that are asked about


class BVqa(ModelMetric):
    """The product over a prompt's noun chunks of P(yes) to `a black cat?`: `b_vqa` (T2I-CompBench, Huang et al. 2023, 4.1)."""

    columns: ClassVar[Mapping[str, Column]] = {"b_vqa": Column("B-VQA", "{:.3f}", of_teacher=True)}

    kind: Literal["b_vqa"] = "b_vqa"
    """Name of the kind."""

    def check(self, prompts: PromptSet) -> None:
        """Raise ValueError for prompts that never have chunks: the demo's."""
        if prompts.kind == "shapes":
            raise ValueError("metric 'b_vqa' needs prompts with noun chunks, such as infra/prompts.jsonl")

    def measure(
        self, images: "Sequence[Image]", prompts: Sequence[Prompt], reference: "Sequence[Image] | None"
    ) -> dict[str, list[float]]:
        """Return `b_vqa`; a prompt without chunks is asked about as a whole. Raises KoalaError where the model cannot be loaded."""
        asked = [[f"{chunk}?" for chunk in (prompt.chunks or (prompt.text,))[:_MOST]] for prompt in prompts]
        answers = questions(self.model, self.revision).yes(images, asked)
        return {"b_vqa": list(map(math.prod, answers))}
