"""CLIP's embeddings of pictures and prompts, for the CLIP score."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from koala.errors import KoalaError


class Clip:
    """A CLIP model of the Hub at a pinned revision. Raises KoalaError where it cannot be had."""

    def __init__(self, model: str, revision: str, device: torch.device) -> None:
        from transformers import CLIPModel, CLIPProcessor

        try:
            self._model = CLIPModel.from_pretrained(model, revision=revision, use_safetensors=True).eval().to(device)
            self._processor = CLIPProcessor.from_pretrained(model, revision=revision)
        except OSError as error:
            raise KoalaError(
                f"cannot load {model} for evaluate.metrics 'clip' ({type(error).__name__}): check the network"
            ) from None

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Unit vectors, N x D."""
        inputs = self._processor(images=list(images), return_tensors="pt").to(self._model.device)
        outputs = self._model.vision_model(**inputs)
        return normalize(self._model.visual_projection(outputs.pooler_output), dim=-1).cpu().numpy()

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> np.ndarray:
        """Unit vectors, N x D."""
        inputs = self._processor(text=list(prompts), return_tensors="pt", padding=True, truncation=True)
        outputs = self._model.text_model(**inputs.to(self._model.device))
        return normalize(self._model.text_projection(outputs.pooler_output), dim=-1).cpu().numpy()
