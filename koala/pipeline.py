"""Loads pipelines of SDXL's layout and draws with them: from a folder, a single file, or the Hub; safetensors only."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from koala.console import hide_loading_bars
from koala.errors import KoalaError

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionXLPipeline
    from PIL.Image import Image

Seeded = tuple[str, int]
"""A prompt and the seed of its picture."""


def device() -> "torch.device":
    """The first CUDA GPU, or the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(model: str | Path, dtype: str = "float32") -> "StableDiffusionXLPipeline":
    """A model folder, a `.safetensors` file of the original layout, or a repository of the Hub (`owner/name`), on `device()`.

    Raises KoalaError where there is no such thing, or it holds no safetensors.
    """
    import torch
    from diffusers import StableDiffusionXLPipeline

    hide_loading_bars()
    path = Path(model)
    kind = getattr(torch, dtype)
    try:
        if path.suffix == ".safetensors" and path.is_file():
            pipeline = StableDiffusionXLPipeline.from_single_file(path, dtype=kind)
        elif path.is_dir() or str(model).count("/") == 1:
            options = {"local_files_only": True} if path.is_dir() else {}
            pipeline = StableDiffusionXLPipeline.from_pretrained(
                model, dtype=kind, use_safetensors=True, add_watermarker=False, **options
            )
        else:
            raise KoalaError(
                f"there is no model at {model}: give a folder, a .safetensors file, or owner/name of the Hub"
            )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise KoalaError(f"cannot load a model of SDXL's kind from {model}: {reason}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device())


def draw(
    pipeline: "StableDiffusionXLPipeline", prompts: Sequence[Seeded], steps: int, guidance: float
) -> "list[Image]":
    """Draw a batch of prompts, each with its own seed.

    Noise comes from a CPU generator of its own for each picture, so that a picture depends neither on its neighbours in
    the batch nor on the device's generator.
    """
    import torch

    return pipeline(
        [text for text, _ in prompts],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for _, seed in prompts],
    ).images
