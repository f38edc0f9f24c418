"""Embeddings of images and captions by a model of the CLIP or SigLIP class."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from koala import pretrained
from koala.data.scores.config import Embedder
from koala.errors import KoalaError

_MOST_ASPECT = 16
_SETTING = "score.embedder"


class ClipEmbedder:
    """A loaded embedder: in float16 on a GPU, in float32 on the CPU."""

    def __init__(self, config: Embedder) -> None:
        """Load the model. Raises KoalaError if it cannot be had, or embeds no images and texts."""
        gpu = torch.cuda.is_available()
        model, processor = pretrained.load(
            "AutoModel", config.model, config.revision, _SETTING, "float16" if gpu else "float32"
        )
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise KoalaError(
                f"{_SETTING}: {config.model} is a {type(model).__name__}: name a model of the CLIP or SigLIP class"
            )
        self._model = model.to("cuda" if gpu else "cpu")
        self._tokenizer, self._processor = processor.tokenizer, processor.image_processor
        self._tokens = model.config.text_config.max_position_embeddings
        # SigLIP was trained on padded captions, and without a mask.
        siglip = model.config.model_type.startswith("siglip")
        self._padding = "max_length" if siglip else "longest"
        self._inputs = ("input_ids",) if siglip else ("input_ids", "attention_mask")
        self.width = self.images([self.prepare(Image.new("RGB", (32, 32)))]).shape[1]

    def prepare(self, image: Image.Image) -> Any:
        """Return the model's input of an RGB image. May be called from several threads."""
        inputs = self._processor(images=_within_aspect(image), input_data_format="channels_last", return_tensors="np")
        return inputs["pixel_values"][0]

    @torch.inference_mode()
    def images(self, prepared: Sequence[Any]) -> np.ndarray:
        """Embed prepared images as unit vectors, N x `width` in float16."""
        pixels = torch.from_numpy(np.stack(prepared)).to(self._model.device, self._model.dtype)
        return _unit(self._model.get_image_features(pixel_values=pixels)).astype(np.float16)

    @torch.inference_mode()
    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """Embed captions as unit vectors, N x `width`. Longer ones are truncated to the model's tokens, 77 for OpenAI's."""
        tokens = self._tokenizer(
            list(captions), padding=self._padding, truncation=True, max_length=self._tokens, return_tensors="pt"
        ).to(self._model.device)
        inputs = {name: tokens[name] for name in self._inputs}
        return _unit(self._model.get_text_features(**inputs))


def _unit(output: Any) -> np.ndarray:
    unit: np.ndarray = normalize(output.pooler_output.float(), dim=-1).cpu().numpy()
    return unit


def _within_aspect(image: Image.Image) -> Image.Image:
    """Crop the middle of a very long image: resized to the model's shorter side, a strip of one pixel would fill the memory."""
    short, long = sorted(image.size)
    if long <= _MOST_ASPECT * short:
        return image
    width, height = (min(side, _MOST_ASPECT * short) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
