"""Loading of SDXL's pipelines, from a folder, a single file or the Hub, and generating images with them."""

import gc
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from koala.console import hide_loading_bars, progress, say
from koala.errors import KoalaError
from koala.evaluate.config import SamplingConfig

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionXLPipeline
    from PIL.Image import Image

Seeded = tuple[str, int]
"""A prompt and the seed of its image."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_EXPECTED = "give a model folder, a .safetensors file, or owner/name of a Hub repository"


def device() -> "torch.device":
    """Return the first CUDA GPU, or the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free_memory() -> None:
    """Free models that nothing refers to, and give their memory of a CUDA GPU back."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def default_dtype() -> str:
    """Return the type to generate in: float16 on a CUDA GPU, float32 on a CPU."""
    return "float16" if device().type == "cuda" else "float32"


def check_model(model: str | Path) -> None:
    """Raise KoalaError where `model` cannot be a model, without importing torch or asking the Hub."""
    name, path = str(model), Path(model).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise KoalaError(f"cannot load a model of SDXL's kind from {model}: the folder has no model_index.json")
    elif path.exists():
        if path.suffix != ".safetensors":
            raise KoalaError(f"cannot load a model from {model}, which is not a .safetensors file: {_EXPECTED}")
    elif path.suffix == ".safetensors":
        raise KoalaError(f"there is no file {model}: {_EXPECTED}")
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1 or ("/" in name and path.parent.exists()):
        raise KoalaError(f"there is no folder {model}: {_EXPECTED}")
    elif not _HUB_ID.fullmatch(name):
        raise KoalaError(f"there is no model at {model}: {_EXPECTED}")


def load(model: str | Path, dtype: str | None = None) -> "StableDiffusionXLPipeline":
    """Load a model folder, a `.safetensors` file of the original layout, or a Hub repository, onto `device()`.

    A file that koala released holds its own configurations and tokenizers; any other takes SDXL's, from the Hub.

    Args:
        model: A path, or `owner/name` of a Hub repository.
        dtype: The weights' type; left out, `default_dtype()`.

    Raises:
        KoalaError: There is no such model, or it holds no safetensors.
    """
    check_model(model)
    import torch
    from diffusers import StableDiffusionXLPipeline

    from koala.teacher.embedded import is_embedded, load_pipeline

    hide_loading_bars()
    path = Path(model).expanduser()
    kind = getattr(torch, dtype or default_dtype())
    try:
        if path.is_file() and is_embedded(path):
            pipeline = load_pipeline(path, kind)
        elif path.is_file():
            pipeline = StableDiffusionXLPipeline.from_single_file(path, dtype=kind)
        else:
            pipeline = StableDiffusionXLPipeline.from_pretrained(
                path if path.is_dir() else str(model),
                dtype=kind,
                use_safetensors=True,
                add_watermarker=False,
                local_files_only=path.is_dir(),
            )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise KoalaError(f"cannot load a model of SDXL's kind from {model}: {reason}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device())


def generate(
    pipeline: "StableDiffusionXLPipeline", prompts: Sequence[Seeded], sampling: SamplingConfig
) -> "list[Image]":
    """Generate a batch of images, each from its own prompt and seed.

    Each image's noise comes from a separate CPU generator, so that an image depends neither on its neighbours in the
    batch nor on the device.
    """
    import torch

    images: list[Image] = pipeline(
        [text for text, _ in prompts],
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        generator=[torch.Generator().manual_seed(seed) for _, seed in prompts],
    ).images
    return images


def generate_grid(
    models: Sequence[str], prompt: str, seed: int, count: int, sampling: SamplingConfig, dtype: str | None, out: Path
) -> None:
    """Generate `count` images of `prompt`, with seeds from `seed` on, and write them to `out` as one PNG.

    The images of one model stand side by side. Those of several form a grid: seeds down, models across.

    Raises:
        KoalaError: A model cannot be loaded. All models are looked at before the first is loaded.
    """
    for model in models:
        check_model(model)
    from koala.plots import grid, tiles

    images = {model: _series(model, prompt, seed, count, sampling, dtype) for model in models}
    if len(images) == 1:
        sheet = tiles(images[models[0]], across=min(count, 4))
    else:
        sheet = grid([f"{prompt} (seed {seed + number})" for number in range(count)], images)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    say(f"{count} image{'s' * (count > 1)} of each model in {out}")


def _series(
    model: str, prompt: str, seed: int, count: int, sampling: SamplingConfig, dtype: str | None
) -> "list[Image]":
    """Generate one model's images, one at a time; the model is freed at the end."""
    pipeline = load(model, dtype)
    numbers = progress(range(count), f"generate {model}")
    return [image for number in numbers for image in generate(pipeline, [(prompt, seed + number)], sampling)]
