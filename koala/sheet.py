"""The command `koala generate`: images of a prompt by one model, or by several side by side."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from koala.console import progress, say
from koala.errors import KoalaError
from koala.evaluate.config import SamplingConfig
from koala.generate import check_dtype, check_model, generate, load
from koala.teacher.config import LoraPart

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline
    from PIL.Image import Image

_FORMATS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Request:
    """What is asked of each model."""

    prompt: str
    """The text."""
    seed: int
    """Seed of the first image; the next one's is one more."""
    count: int
    """Images."""
    sampling: SamplingConfig
    """Steps and guidance."""
    negative: str | None = None
    """What guidance leads away from."""
    size: tuple[int | None, int | None] = (None, None)
    """Height and width in pixels; None for the model's own."""


def generate_sheet(
    models: Sequence[str],
    request: Request,
    out: Path,
    loras: Sequence[LoraPart] = (),
    base: str | None = None,
    dtype: str | None = None,
) -> None:
    """Generate each model's images and write them to `out` as one image.

    The images of one model stand side by side. Those of several form a grid: seeds down, models across.

    Args:
        models: Folders, files or Hub repositories.
        request: What is generated.
        out: The file; its suffix says the format.
        loras: LoRAs for SDXL, or for the model itself, that each model gets.
        base: The model whose text encoders and VAE a U-Net's file takes.
        dtype: The weights' type; left out, the device's.

    Raises:
        KoalaError: `out` has no suffix of an image, or a model or a LoRA cannot be loaded. All are looked for before the first
            is loaded.
    """
    if out.suffix.lower() not in _FORMATS:
        raise KoalaError(f"--out {out}: name a file of one of {', '.join(_FORMATS)}")
    check(models, loras, base, dtype)
    from koala.plots import grid, tiles

    images = {}
    for model in models:
        pipeline = open_model(model, loras, base, dtype)
        images[model] = draw(pipeline, request, f"generate {model}")
        del pipeline  # the next model takes its place in memory
    if len(images) == 1:
        sheet = tiles(images[models[0]], across=min(request.count, 4))
    else:
        rows = [f"{request.prompt} (seed {request.seed + number})" for number in range(request.count)]
        sheet = grid(rows, images)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    say(f"{request.count} image{'s' * (request.count > 1)} of each model in {out}")


def check(models: Sequence[str], loras: Sequence[LoraPart], base: str | None, dtype: str | None) -> None:
    """Raise KoalaError for what cannot be loaded, as far as torch is not needed for it. Arguments as of `generate_sheet`."""
    check_dtype(dtype)
    for model in (*models, *([base] if base else [])):
        check_model(model)
    for lora in loras:
        if not lora.file.is_file():
            raise KoalaError(f"there is no LoRA at {lora.file}: give a .safetensors file")


def open_model(
    model: str, loras: Sequence[LoraPart] = (), base: str | None = None, dtype: str | None = None
) -> "StableDiffusionXLPipeline":
    """Load a model with LoRAs fused into it.

    A LoRA whose modules the model has under the LoRA's names is taken as it is; any other is one for SDXL, and renamed for
    the student. Raises KoalaError where the model or a LoRA cannot be loaded.
    """
    pipeline = load(model, dtype, base)
    if not loras:
        return pipeline
    from koala.publish.lora import convert, is_for, kept, kept_by_shape, renaming
    from koala.teacher.loras import fuse_into
    from koala.unet.reference import SDXL

    unet = dict(pipeline.unet.config)
    with tempfile.TemporaryDirectory(prefix="koala-lora-") as folder:
        for number, lora in enumerate(loras):
            fitting = lora
            if not is_for(lora.file, unet):
                path = Path(model).expanduser()
                stages = kept(path, SDXL) if path.is_dir() else kept_by_shape(unet, SDXL, model)
                renamed = Path(folder, f"{number}.safetensors")
                found = convert(lora.file, renamed, renaming(SDXL, unet, stages))
                say(f"LoRA {lora.file}: {model} lacks {len(found.dropped)} of its modules, which are left out")
                fitting = lora.model_copy(update={"file": renamed})
            fuse_into(pipeline, fitting)
    return pipeline


def draw(pipeline: "StableDiffusionXLPipeline", request: Request, label: str) -> "list[Image]":
    """Generate one model's images, one at a time. Raises KoalaError for a size that the model cannot make."""
    factor = pipeline.vae_scale_factor
    for side in request.size:
        if side is not None and side % factor:
            raise KoalaError(f"--height and --width must be multiples of {factor} px: {side} is none")
    return [
        image
        for number in progress(range(request.count), label)
        for image in generate(
            pipeline, [(request.prompt, request.seed + number)], request.sampling, request.negative, request.size
        )
    ]
