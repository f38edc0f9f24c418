"""Models by which metrics see images and prompts: from the Hub at a pinned revision, or from a folder.

Only safetensors and transformers' own classes, in float32. One model is in memory at a time: asking for another frees it, and
`forget` the last one. What it has made of a series of images is kept with it, so that the teacher's are embedded once.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from koala import pretrained
from koala.console import hide_loading_bars
from koala.evaluate.metrics.base import SETTING
from koala.evaluate.open_clip import from_open_clip
from koala.generate import device, free_memory

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_BATCH = 32  # images or prompts at once
_QUESTIONED = 8  # images at once, each with up to 8 questions
_WEIGHTS = "model.safetensors"

_held: dict[tuple[str | None, ...], Any] = {}


def clip(model: str, revision: str | None) -> "Clip":
    """Return a CLIP model.

    Args:
        model: A Hub repository, or a folder.
        revision: The Hub commit; None of a folder.

    Raises:
        KoalaError: It cannot be had, holds no safetensors, or is another model.
    """
    return _hold(("clip", model, revision), lambda: Clip(*_load("CLIPModel", model, revision)))


def open_clip(model: str, revision: str | None, base: str, base_revision: str | None) -> "Clip":
    """Return a CLIP model whose weights are in open_clip's layout. Raises KoalaError as `clip` does.

    Args:
        model: A Hub repository, or a folder, with model.safetensors.
        revision: The Hub commit; None of a folder.
        base: The model that it was trained from, a Hub repository or a folder: its configuration, tokenizer and image
            processor are taken.
        base_revision: The Hub commit of `base`.
    """
    return _hold(
        ("open_clip", model, revision, base, base_revision),
        lambda: Clip(*_load_open_clip(model, revision, base, base_revision)),
    )


def dino(model: str, revision: str | None) -> "Dino":
    """Return a DINOv2 model. Arguments and errors as of `clip`."""
    return _hold(("dino", model, revision), lambda: Dino(*_load("Dinov2Model", model, revision)))


def questions(model: str, revision: str | None) -> "Questions":
    """Return a BLIP model that answers questions. Arguments and errors as of `clip`."""
    return _hold(("questions", model, revision), lambda: Questions(*_load("BlipForQuestionAnswering", model, revision)))


def forget() -> None:
    """Free the model that was asked for last."""
    if _held:
        _held.clear()
        free_memory()


class Clip:
    """A CLIP model."""

    def __init__(self, model: Any, processor: Any) -> None:
        """Take a `CLIPModel` and its processor."""
        self._model, self._processor = model, processor
        self._images = _Remembered(self._embed_images)

    @property
    def scale(self) -> float:
        """The model's own factor of cosines (the exponential of its logit scale)."""
        return float(self._model.logit_scale.detach().exp())

    def images(self, images: "Sequence[Image]") -> "np.ndarray":
        """Embed images as unit vectors, N x D."""
        return self._images(images)

    def texts(self, prompts: Sequence[str]) -> "np.ndarray":
        """Embed prompts as unit vectors, N x D. Longer ones are cut to the model's tokens, 77 for OpenAI's."""
        return _in_batches(self._embed_texts, prompts)

    def cosines(self, images: "Sequence[Image]", prompts: Sequence[str]) -> "np.ndarray":
        """Return the cosine of each image and its prompt, N."""
        cosines: np.ndarray = (self.images(images) * self.texts(prompts)).sum(axis=1)
        return cosines

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

    def __init__(self, model: Any, processor: Any) -> None:
        """Take a `Dinov2Model` and its processor."""
        self._model, self._processor = model, processor
        self._images = _Remembered(self._class_tokens)

    def images(self, images: "Sequence[Image]") -> "np.ndarray":
        """Return the class token of each image after the last norm, N x D. An image that is not square is squeezed."""
        return self._images(images)

    def _class_tokens(self, images: "list[Image]") -> "np.ndarray":
        # The whole image at the model's side, as Stein et al. have it: a crop, the processor's default, would hide the borders.
        inputs = self._processor(
            images=images, size=dict(self._processor.crop_size), do_center_crop=False, return_tensors="pt"
        ).to(self._model.device)
        tokens: np.ndarray = self._model(**inputs).pooler_output.float().cpu().numpy()
        return tokens


class Questions:
    """A BLIP model that answers questions about images."""

    def __init__(self, model: Any, processor: Any) -> None:
        """Take a `BlipForQuestionAnswering` and its processor."""
        self._model, self._processor = model, processor

    def yes(self, images: "Sequence[Image]", asked: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return P(yes) / (P(yes) + P(no)) of each question about each image, by the first word of the answer."""
        import torch

        with torch.no_grad():
            return [
                answers
                for first in range(0, len(images), _QUESTIONED)
                for answers in self._answers(
                    list(images[first : first + _QUESTIONED]), asked[first : first + _QUESTIONED]
                )
            ]

    def _answers(self, images: "list[Image]", asked: Sequence[Sequence[str]]) -> list[list[float]]:
        """Answer a batch of images. Each is looked at once.

        Questions of one length are asked together: transformers' BLIP does not mask padding where the answer looks at the
        question, so that padding would change the answer.
        """
        import torch

        model, tokenizer = self._model, self._processor.tokenizer
        pixels = self._processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        seen = model.vision_model(pixels.to(model.device), interpolate_pos_encoding=True).last_hidden_state
        image_of = [number for number, each in enumerate(asked) for _ in each]
        tokens = tokenizer([question for each in asked for question in each])["input_ids"]
        answers: list[list[float]] = [[] for _ in asked]
        yes_no = tokenizer.convert_tokens_to_ids(["yes", "no"])
        found = torch.empty(len(tokens))
        for length in set(map(len, tokens)):
            rows = [row for row, each in enumerate(tokens) if len(each) == length]
            understood = model.text_encoder(
                input_ids=torch.tensor([tokens[row] for row in rows], device=seen.device),
                encoder_hidden_states=seen[[image_of[row] for row in rows]],
                return_dict=True,
            ).last_hidden_state
            start = torch.full((len(rows), 1), model.decoder_start_token_id, device=seen.device)
            logits = model.text_decoder(input_ids=start, encoder_hidden_states=understood, return_dict=True).logits
            found[rows] = logits[:, -1, yes_no].float().softmax(dim=-1)[:, 0].cpu()
        for number, answer in zip(image_of, found.tolist(), strict=True):
            answers[number].append(answer)
        return answers


class _Remembered:
    """A function of images in batches. Its result for a series of images is kept: the series is compared by identity."""

    def __init__(self, embed: "Callable[[list[Any]], np.ndarray]") -> None:
        self._embed = embed
        self._found: list[tuple[Sequence[Any], np.ndarray]] = []

    def __call__(self, images: "Sequence[Image]") -> "np.ndarray":
        for known, vectors in self._found:
            if known is images:
                return vectors
        vectors = _in_batches(self._embed, images)
        self._found.append((images, vectors))
        return vectors


_Held = TypeVar("_Held")


def _hold(key: tuple[str | None, ...], load: Callable[[], _Held]) -> _Held:
    """Return what was loaded under `key`, or free what is held and load it."""
    if key not in _held:
        forget()
        _held[key] = load()
    held: _Held = _held[key]
    return held


def _load(architecture: str, model: str, revision: str | None) -> tuple[Any, Any]:
    """Return a model of transformers on `device()`, and its processor. architecture: the name of its class."""
    loaded, processor = pretrained.load(architecture, model, revision, SETTING)
    return loaded.to(device()), processor


def _load_open_clip(model: str, revision: str | None, base: str, base_revision: str | None) -> tuple[Any, Any]:
    import torch
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file
    from transformers import AutoProcessor, CLIPConfig, CLIPModel

    hide_loading_bars()
    with pretrained.errors("CLIPModel", base, base_revision, SETTING):
        config = CLIPConfig.from_pretrained(base, revision=base_revision)
        processor = AutoProcessor.from_pretrained(base, revision=base_revision)
    with pretrained.errors("CLIPModel", model, revision, SETTING):
        folder = Path(model)
        file = folder / _WEIGHTS if folder.is_dir() else hf_hub_download(model, _WEIGHTS, revision=revision)
        with torch.device("meta"):
            names = CLIPModel(config).state_dict()
        tensors = from_open_clip(load_file(file), names)
        loaded = CLIPModel.from_pretrained(None, config=config, state_dict=tensors, dtype="float32")
    return loaded.eval().to(device()), processor


def _in_batches(embed: "Callable[[list[Any]], np.ndarray]", items: Sequence[Any]) -> "np.ndarray":
    import numpy as np
    import torch

    with torch.no_grad():
        batches = [embed(list(items[first : first + _BATCH])) for first in range(0, len(items), _BATCH)]
    return np.concatenate(batches)


def _unit(vectors: Any) -> "np.ndarray":
    from torch.nn.functional import normalize

    unit: np.ndarray = normalize(vectors.float(), dim=-1).cpu().numpy()
    return unit
