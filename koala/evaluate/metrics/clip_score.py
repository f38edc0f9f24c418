"""CLIP score: how well images fit their prompts, by CLIP's embeddings."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from koala.errors import KoalaError
from koala.evaluate.metrics.base import Column, Metric
from koala.evaluate.prompts import Prompt
from koala.generate import device

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_BATCH = 32  # images or prompts that CLIP embeds at once


class ClipScore(Metric):
    """100 x the cosine of CLIP's embeddings of image and prompt: `clip_score`."""

    # The spread is the one at which 100 prompts see a loss of 2 % with a power of 0.80, and 200 with 0.97. It is assumed:
    # measure it on a student of yours, and state that.
    columns: ClassVar[Mapping[str, Column]] = {
        "clip_score": Column("CLIP score", "{:.2f}", of_teacher=True, spread=0.08)
    }

    kind: Literal["clip_score"] = "clip_score"
    """Name of the kind."""

    model: str
    """The CLIP model: a Hub repository, or a folder."""

    revision: str
    """The Hub commit of the model, pinned so that scores stay comparable."""

    def measure(
        self, images: "Sequence[Image]", prompts: Sequence[Prompt], reference: "Sequence[Image] | None"
    ) -> dict[str, list[float]]:
        """Return `clip_score`. Raises KoalaError where the CLIP model cannot be loaded."""
        clip = _clip(self.model, self.revision)
        return {"clip_score": clip_score(images, [prompt.text for prompt in prompts], clip.images, clip.texts)}


def clip_score(
    images: "Sequence[Image]",
    prompts: Sequence[str],
    embed: "Callable[[Sequence[Image]], np.ndarray]",
    embed_text: "Callable[[Sequence[str]], np.ndarray]",
) -> list[float]:
    """Return 100 x the cosine of each image and its prompt, never below 0 (Hessel et al. 2021, with w = 100).

    embed, embed_text: to unit vectors, N x D.
    """
    cosines = (embed(images) * embed_text(prompts)).sum(axis=1)
    return [float(100 * cosine) for cosine in cosines.clip(0, None)]


class Clip:
    """A CLIP model of the Hub at a pinned revision, or of a folder."""

    def __init__(self, model: str, revision: str) -> None:
        """Load the model onto `device()`. Raises KoalaError where it cannot be had."""
        from transformers import CLIPModel, CLIPProcessor

        try:
            loaded = CLIPModel.from_pretrained(model, revision=revision, use_safetensors=True)
            self._processor = CLIPProcessor.from_pretrained(model, revision=revision)
        except OSError as error:
            raise KoalaError(
                f"cannot load {model} for evaluate.metrics.clip_score ({type(error).__name__}): check the network"
            ) from None
        self._model = loaded.eval().to(device())

    def images(self, images: "Sequence[Image]") -> "np.ndarray":
        """Embed images as unit vectors, N x D."""
        return _in_batches(self._embed_images, images)

    def texts(self, prompts: Sequence[str]) -> "np.ndarray":
        """Embed prompts as unit vectors, N x D."""
        return _in_batches(self._embed_texts, prompts)

    def _embed_images(self, images: "list[Image]") -> "np.ndarray":
        inputs = self._processor(images=images, return_tensors="pt").to(self._model.device)
        outputs = self._model.vision_model(**inputs)
        return _unit(self._model.visual_projection(outputs.pooler_output))

    def _embed_texts(self, prompts: list[str]) -> "np.ndarray":
        inputs = self._processor(text=prompts, return_tensors="pt", padding=True, truncation=True)
        outputs = self._model.text_model(**inputs.to(self._model.device))
        return _unit(self._model.text_projection(outputs.pooler_output))


@lru_cache(maxsize=1)
def _clip(model: str, revision: str) -> Clip:
    return Clip(model, revision)


def _in_batches(embed: "Callable[[list[Any]], np.ndarray]", items: Sequence[Any]) -> "np.ndarray":
    import numpy as np
    import torch

    with torch.no_grad():
        batches = [
            embed([items[number] for number in range(first, min(first + _BATCH, len(items)))])
            for first in range(0, len(items), _BATCH)
        ]
    return np.concatenate(batches)


def _unit(vectors: Any) -> "np.ndarray":
    from torch.nn.functional import normalize

    unit: np.ndarray = normalize(vectors, dim=-1).cpu().numpy()
    return unit
