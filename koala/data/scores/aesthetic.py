"""LAION's aesthetic score: a linear head on CLIP's embedding.

Both of LAION's heads are linear. The second one ("improved") has five layers, and nothing but dropout between them:
https://github.com/christophschuhmann/improved-aesthetic-predictor.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from koala import pretrained
from koala.data.scores.base import EmbeddingScorer, Texts

if TYPE_CHECKING:
    import numpy as np

_Layer = tuple["np.ndarray", "np.ndarray"]


class Aesthetic(EmbeddingScorer, pretrained.PinnedModel):
    """Predicted rating by people, 1 to 10, of an embedding by the model that the head was trained on: CLIP ViT-L/14 for LAION's."""

    kind: Literal["aesthetic"] = "aesthetic"
    """Name of the score."""
    file: str = "model.safetensors"
    """The safetensors file."""
    prefix: str = ""
    """What the names of the head's tensors begin with, where the file holds more than the head, such as `predictor.`."""

    def load(self, embedder: Texts) -> "Callable[[np.ndarray, Sequence[str]], np.ndarray]":
        """Return the head. Raises KoalaError if it cannot be had, or does not take the embedder's embeddings."""
        with pretrained.errors("linear head", self.model, self.revision, "score.scorers.aesthetic"):
            layers = self._layers(embedder.width)

        def head(embeddings: "np.ndarray", _captions: Sequence[str]) -> "np.ndarray":
            values = embeddings
            for weight, bias in layers:
                values = values @ weight.T + bias
            return values[:, 0]

        return head

    def _layers(self, width: int) -> list[_Layer]:
        from huggingface_hub import hf_hub_download
        from safetensors import safe_open

        folder = Path(self.model)
        file = folder / self.file if folder.is_dir() else hf_hub_download(self.model, self.file, revision=self.revision)
        with safe_open(file, framework="pt") as tensors:
            mine = [name for name in tensors.keys() if name.startswith(self.prefix)]  # noqa: SIM118
            arrays = {name: tensors.get_tensor(name).float().numpy() for name in mine}
        weights = sorted((name for name in mine if name.endswith("weight")), key=_place)
        layers = [(arrays[name], arrays.get(name.removesuffix("weight") + "bias")) for name in weights]
        sides = [width, *(weight.shape[0] for weight, _ in layers)]
        shapes = [weight.shape for weight, _ in layers]
        fits = shapes == list(zip(sides[1:], sides, strict=False)) and all(
            bias is not None and bias.shape == weight.shape[:1] for weight, bias in layers
        )
        if not layers or not fits or sides[-1] != 1 or len(arrays) != 2 * len(layers):
            raise pretrained.WrongModelError(
                f"it holds {', '.join(sorted(mine)[:4]) or 'nothing'} of shapes {shapes[:5]}, no linear layers from "
                f"the embedder's {width} numbers to one; see `prefix`"
            )
        return [(weight, bias) for weight, bias in layers if bias is not None]


def _place(name: str) -> list[int]:
    """Return the numbers in a tensor's name: `layers.10.weight` comes after `layers.2.weight`."""
    return [int(number) for number in re.findall(r"\d+", name)]
