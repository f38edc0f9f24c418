"""Loading of SDXL's pipelines, from a folder, a single file or the Hub, and generating images with them."""

import gc
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from koala.console import hide_loading_bars
from koala.errors import KoalaError
from koala.evaluate.config import SamplingConfig
from koala.teacher.layout import check_vocabularies

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionXLPipeline
    from PIL.Image import Image

Seeded = tuple[str, int]
"""A prompt and the seed of its image."""

_DTYPES = ("float32", "float16", "bfloat16")
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


def check_dtype(dtype: str | None) -> None:
    """Raise KoalaError for what is no type of weights, without importing torch."""
    if dtype not in (None, *_DTYPES):
        raise KoalaError(f"--dtype {dtype}: choose one of {', '.join(_DTYPES)}")


def check_model(model: str | Path) -> None:
    """Raise KoalaError where `model` cannot be a model, without importing torch or asking the Hub."""
    name, path = str(model), Path(model).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise KoalaError(f"cannot load a model of SDXL's kind from {model}: the folder has no model_index.json")
        check_vocabularies(path, str(model))
    elif path.exists():
        if path.suffix != ".safetensors":
            raise KoalaError(f"cannot load a model from {model}, which is not a .safetensors file: {_EXPECTED}")
    elif path.suffix == ".safetensors":
        raise KoalaError(f"there is no file {model}: {_EXPECTED}")
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1 or ("/" in name and path.parent.exists()):
        raise KoalaError(f"there is no folder {model}: {_EXPECTED}")
    elif not _HUB_ID.fullmatch(name):
        raise KoalaError(f"there is no model at {model}: {_EXPECTED}")


def load(model: str | Path, dtype: str | None = None, base: str | Path | None = None) -> "StableDiffusionXLPipeline":
    """Load a model folder, a `.safetensors` file of the original layout, or a Hub repository, onto `device()`.

    A file that koala released holds its own configurations and tokenizers; any other takes SDXL's, from the Hub.

    Args:
        model: A path, or `owner/name` of a Hub repository.
        dtype: The weights' type; left out, `default_dtype()`.
        base: The model whose text encoders, VAE and scheduler a released U-Net's file takes.

    Raises:
        KoalaError: There is no such model, it holds no safetensors, or a U-Net's file has no `base`.
    """
    check_model(model)
    import torch
    from diffusers import StableDiffusionXLPipeline
    from safetensors import SafetensorError

    from koala.teacher.embedded import is_embedded, is_unet, load_pipeline, load_unet

    hide_loading_bars()
    path = Path(model).expanduser()
    kind = getattr(torch, dtype or default_dtype())
    if path.is_file() and is_unet(path):
        if base is None:
            raise KoalaError(f"{model} is a U-Net: name the model whose text encoders and VAE it takes (--base)")
        pipeline = load(base, dtype)
        pipeline.register_modules(unet=load_unet(path, kind).to(device()))
        return pipeline
    try:
        if path.is_file() and is_embedded(path):
            pipeline = load_pipeline(path, kind)
        elif path.is_file():
            pipeline = StableDiffusionXLPipeline.from_single_file(path, dtype=kind, add_watermarker=False)
        else:
            pipeline = StableDiffusionXLPipeline.from_pretrained(
                path if path.is_dir() else str(model),
                dtype=kind,
                use_safetensors=True,
                add_watermarker=False,
                local_files_only=path.is_dir(),
            )
    # ImportError: of a scheduler that needs another package. transformers lets SafetensorError through.
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise KoalaError(f"cannot load a model of SDXL's kind from {model}: {reason}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device())


def generate(
    pipeline: "StableDiffusionXLPipeline",
    prompts: Sequence[Seeded],
    sampling: SamplingConfig,
    negative: str | None = None,
    size: tuple[int | None, int | None] = (None, None),
) -> "list[Image]":
    """Generate a batch of images, each from its own prompt and seed.

    Each image's noise comes from a separate CPU generator, so that an image depends neither on its neighbours in the
    batch nor on the device. `negative` is what guidance leads away from; `size` is height and width in pixels, None for
    the model's own.
    """
    import torch

    images: list[Image] = pipeline(
        [text for text, _ in prompts],
        negative_prompt=[negative] * len(prompts) if negative else None,
        height=size[0],
        width=size[1],
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        generator=[torch.Generator().manual_seed(seed) for _, seed in prompts],
    ).images
    return images
