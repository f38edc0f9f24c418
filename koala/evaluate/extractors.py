"""Models by which metrics see images and prompts: from the Hub at a pinned revision, or from a folder.

Only safetensors and transformers' own classes. One model is in memory at a time: `forget` frees it.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from koala.errors import DISK_FULL, KoalaError
from koala.generate import device, free_memory

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_BATCH = 32  # images or prompts at once


@lru_cache(maxsize=1)
def load(architecture: str, model: str, revision: str) -> tuple[Any, Any]:
    """Return a model of transformers on `device()`, and its processor.

    Args:
        architecture: Name of its class in transformers.
        model: A Hub repository, or a folder.
        revision: The Hub commit.

    Raises:
        KoalaError: It cannot be had, or holds no safetensors.
    """
    import transformers

    try:
        loaded = getattr(transformers, architecture).from_pretrained(model, revision=revision, use_safetensors=True)
        processor = transformers.AutoProcessor.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        raise KoalaError(
            f"cannot load {model} at {revision} as a {architecture} for evaluate.metrics ({type(error).__name__}): check the "
            "name and the revision, that it holds safetensors, and the network"
        ) from None
    return loaded.eval().to(device()), processor


def forget() -> None:
    """Free the model that `load` returned last."""
    load.cache_clear()
    free_memory()


class Clip:
    """A CLIP model."""

    def __init__(self, model: str, revision: str) -> None:
        """Load it. Raises KoalaError where it cannot be had."""
        self._model, self._processor = load("CLIPModel", model, revision)

    @property
    def scale(self) -> float:
        """The model's own factor of cosines (the exponential of its logit scale)."""
        return float(self._model.logit_scale.exp())

    def images(self, images: "Sequence[Image]") -> "np.ndarray":
        """Embed images as unit vectors, N x D."""
        return _in_batches(self._embed_images, images)

    def texts(self, prompts: Sequence[str]) -> "np.ndarray":
        """Embed prompts as unit vectors, N x D. Longer ones are cut to the model's tokens, 77 for OpenAI's."""
        return _in_batches(self._embed_texts, prompts)

    def _embed_images(self, images: "list[Image]") -> "np.ndarray":
        inputs = self._processor(images=images, return_tensors="pt").to(self._model.device)
        outputs = self._model.vision_model(**inputs)
        return _unit(self._model.visual_projection(outputs.pooler_output))

    def _embed_texts(self, prompts: list[str]) -> "np.ndarray":
        tokens = self._model.config.text_config.max_position_embeddings
        inputs = self._processor(text=prompts, return_tensors="pt", padding=True, truncation=True, max_length=tokens)
        outputs = self._model.text_model(**inputs.to(self._model.device))
        return _unit(self._model.text_projection(outputs.pooler_output))


class Dino:
    """A DINOv2 model."""

    def __init__(self, model: str, revision: str) -> None:
        """Load it. Raises KoalaError where it cannot be had."""
        self._model, self._processor = load("Dinov2Model", model, revision)

    def images(self, images: "Sequence[Image]") -> "np.ndarray":
        """Return the class token of each image after the last norm, N x D."""
        return _in_batches(self._class_tokens, images)

    def _class_tokens(self, images: "list[Image]") -> "np.ndarray":
        inputs = self._processor(images=images, return_tensors="pt").to(self._model.device)
        tokens: np.ndarray = self._model(**inputs).pooler_output.float().cpu().numpy()
        return tokens


class Questions:
    """A BLIP model that answers questions about images."""

    def __init__(self, model: str, revision: str) -> None:
        """Load it. Raises KoalaError where it cannot be had."""
        self._model, self._processor = load("BlipForQuestionAnswering", model, revision)

    def yes(self, image: "Image", questions: Sequence[str]) -> list[float]:
        """Return P(yes) / (P(yes) + P(no)) of each question about an image, by the first word of the answer.

        The image is looked at once. Each question is asked alone: padding beside a longer one changes its answer a little.
        """
        import torch

        model, device = self._model, self._model.device
        with torch.no_grad():
            pixels = self._processor(images=image, return_tensors="pt")["pixel_values"].to(device)
            seen = model.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
            return [self._answer(seen, question) for question in questions]

    def _answer(self, seen: Any, question: str) -> float:
        import torch

        model, tokenizer = self._model, self._processor.tokenizer
        words = tokenizer(question, return_tensors="pt").to(seen.device)
        understood = model.text_encoder(
            input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
            encoder_hidden_states=seen,
            return_dict=True,
        ).last_hidden_state
        start = torch.tensor([[model.decoder_start_token_id]], device=seen.device)
        logits = model.text_decoder(input_ids=start, encoder_hidden_states=understood, return_dict=True).logits
        answers = tokenizer.convert_tokens_to_ids(["yes", "no"])
        return float(logits[0, -1, answers].float().softmax(dim=-1)[0])


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

    unit: np.ndarray = normalize(vectors.float(), dim=-1).cpu().numpy()
    return unit
