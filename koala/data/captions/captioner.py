"""Captions of images by an image-to-text model of transformers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from PIL import Image

from koala import pretrained
from koala.data.captions.config import RecaptionConfig
from koala.errors import KoalaError

_ARCHITECTURE = "AutoModelForImageTextToText"
_SETTING = "recaption.model"


class Captioner:
    """A loaded model: in bfloat16 on a GPU, in float32 on the CPU. It decodes greedily."""

    def __init__(self, config: RecaptionConfig) -> None:
        """Load the model. Raises KoalaError if it cannot be had, or takes no prompt where there is one."""
        gpu = torch.cuda.is_available()
        name, dtype = str(config.model), "bfloat16" if gpu else "float32"
        model, processor = pretrained.load(_ARCHITECTURE, name, config.revision, _SETTING, dtype)
        self._model, self._config = model.to("cuda" if gpu else "cpu"), config
        self._pair: tuple[Any, Any] | None = (
            None  # image processor and tokenizer, of a model without a processor of both
        )
        if not (hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")):
            if config.prompt:
                raise KoalaError(f"{_SETTING}: {name} is a {type(model).__name__}, which takes no prompt: leave it out")
            with pretrained.errors(_ARCHITECTURE, name, config.revision, _SETTING):
                self._pair = (
                    transformers.AutoImageProcessor.from_pretrained(name, revision=config.revision or "main"),
                    transformers.AutoTokenizer.from_pretrained(name, revision=config.revision or "main"),
                )
        self._processor = processor
        self._tokenizer = self._pair[1] if self._pair else processor.tokenizer
        self._tokenizer.padding_side = "left"  # what is generated follows the prompt at once
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = self._tokenizer.pad_token_id

    @torch.inference_mode()
    def captions(self, images: Sequence[Image.Image]) -> list[str]:
        """Return a caption for each RGB image, on one line; empty where the model says nothing."""
        inputs = {
            name: value.to(self._model.device, self._model.dtype if value.is_floating_point() else None)
            for name, value in self._inputs(list(images)).items()
        }
        tokens = self._model.generate(
            **inputs,
            max_new_tokens=self._config.max_tokens,
            do_sample=False,
            num_beams=1,
        )
        asked = inputs.get("input_ids")
        if asked is not None and torch.equal(tokens[:, : asked.shape[1]], asked):  # a decoder alone repeats the prompt
            tokens = tokens[:, asked.shape[1] :]
        return [_line(text) for text in self._tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def _inputs(self, images: list[Image.Image]) -> Mapping[str, torch.Tensor]:
        if self._pair:
            pixels: torch.Tensor = self._pair[0](images=images, return_tensors="pt")["pixel_values"]
            return {"pixel_values": pixels}
        prompt = self._config.prompt
        if prompt and getattr(self._processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            prompt = self._processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            prompt = prompt.removeprefix(self._tokenizer.bos_token or "")  # the tokenizer begins with it
        text = {"text": [prompt] * len(images), "padding": True} if prompt else {}
        inputs: Mapping[str, torch.Tensor] = self._processor(images=images, return_tensors="pt", **text)
        return inputs


def _line(text: str) -> str:
    """Return text without control characters, its white space single."""
    words = "".join(character if character.isprintable() else " " for character in text).split()
    return " ".join(words)
