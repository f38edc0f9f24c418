"""HPS v2.1: how people would judge an image for its prompt, by a CLIP model trained on their rankings."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import model_validator

from koala import pretrained
from koala.evaluate.extractors import open_clip
from koala.evaluate.metrics.base import SETTING, Column, ModelMetric
from koala.evaluate.prompts import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image


class HpsV21(ModelMetric):
    """100 x the cosine of image and prompt by HPS v2.1, without a scale: `hps_v21` (Wu et al. 2023).

    An image that is not square is cropped in its centre, as `base` has it; the authors pad it.
    """

    # The spread is the one at which 100 prompts see a loss of 2 % with a power of 0.93. It is assumed.
    columns: ClassVar[Mapping[str, Column]] = {"hps_v21": Column("HPS v2.1", "{:.2f}", of_teacher=True, spread=0.064)}

    kind: Literal["hps_v21"] = "hps_v21"
    """Name of the kind."""

    base: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """The model that it was trained from: a Hub repository, or a folder. Its configuration, tokenizer and image processor are
    taken, which the weights of HPS come without."""

    base_revision: str | None = "1c2b8495b28150b8a4922ee1c8edee224c284c0c"
    """The Hub commit of `base`. A folder has none."""

    @model_validator(mode="after")
    def _base_is_pinned(self) -> Self:
        pretrained.check_pinned(self.base, self.base_revision)
        return self

    def find(self) -> None:
        """Look for the weights and for the model that they were trained from."""
        pretrained.find(self.model, self.revision, "model.safetensors", SETTING)
        pretrained.find(self.base, self.base_revision, "config.json", SETTING)

    def measure(
        self, images: "Sequence[Image]", prompts: Sequence[Prompt], reference: "Sequence[Image] | None"
    ) -> dict[str, list[float]]:
        """Return `hps_v21`. Raises KoalaError where a model cannot be loaded."""
        clip = open_clip(self.model, self.revision, self.base, self.base_revision)
        return {"hps_v21": (100 * clip.cosines(images, [prompt.text for prompt in prompts])).tolist()}
