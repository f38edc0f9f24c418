"""A model's images of the evaluation prompts: a folder of PNG files, numbered as the prompts.

Beside the images, prompts.jsonl holds their prompts and seeds, and settings.json how they were generated.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from koala.errors import KoalaError
from koala.evaluate.config import EvaluateConfig
from koala.evaluate.prompts import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS = "prompts.jsonl"
SETTINGS = "settings.json"
OVERVIEW = "images"
"""Key under which every model's run shows its first images, so that MLflow puts models side by side."""
_SHOWN = 16


class Images(Sequence["Image"]):
    """Images of a folder. Each is opened on access, so that any number fits into memory."""

    def __init__(self, folder: Path, count: int) -> None:
        """Take the first `count` images of `folder`."""
        self._files = [image_file(folder, number) for number in range(count)]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> "Image": ...

    @overload
    def __getitem__(self, index: slice) -> "list[Image]": ...

    def __getitem__(self, index: int | slice) -> "Image | list[Image]":
        """Open an image, or those of a slice, as RGB."""
        if isinstance(index, slice):
            return [_open(file) for file in self._files[index]]
        return _open(self._files[index])


def overview(images: Sequence["Image"]) -> "Image":
    """Return a model's first images as one: of all models the same prompts and seeds."""
    from koala.plots import tiles

    return tiles(images[:_SHOWN], across=4)


def image_file(folder: Path, number: int) -> Path:
    """Return the file of the image of prompt `number`, counted from 0."""
    return folder / f"{number:06d}.png"


def prepare(folder: Path, prompts: Sequence[Prompt], config: EvaluateConfig) -> None:
    """Prepare a folder of images; those of other prompts or settings are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {PROMPTS: _prompt_lines(prompts), SETTINGS: _settings(config)}
    if all(_read(folder / name) == text for name, text in wanted.items()):
        return
    for pattern in ("[0-9]*.png", "[0-9]*.partial"):
        for file in folder.glob(pattern):
            file.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text)


def read_images(folder: Path, prompts: Sequence[Prompt], config: EvaluateConfig) -> Images:
    """Return the images of `folder`, which the stage `reference` made.

    Raises:
        KoalaError: They are of other prompts, seeds or settings, or some are missing.
    """
    again = "run `koala reference` again"
    if _read(folder / PROMPTS) != _prompt_lines(prompts):
        raise KoalaError(f"{folder} holds images of other prompts or seeds than evaluate.prompts asks for: {again}")
    if _read(folder / SETTINGS) != _settings(config):
        raise KoalaError(f"the images of {folder} were generated with other steps, guidance or dtype: {again}")
    missing = sum(not image_file(folder, number).is_file() for number in range(len(prompts)))
    if missing:
        raise KoalaError(f"{folder} lacks {missing} of its {len(prompts)} images: {again}")
    return Images(folder, len(prompts))


def _prompt_lines(prompts: Sequence[Prompt]) -> str:
    return "".join(json.dumps({"text": prompt.text, "seed": prompt.seed}) + "\n" for prompt in prompts)


def _settings(config: EvaluateConfig) -> str:
    settings: dict[str, Any] = {
        "steps": config.sampling.steps,
        "guidance": config.sampling.guidance,
        "dtype": config.dtype,
    }
    return json.dumps(settings) + "\n"


def _read(file: Path) -> str | None:
    return file.read_text() if file.is_file() else None


def _open(file: Path) -> "Image":
    from PIL import Image

    with Image.open(file) as image:
        return image.convert("RGB")
