"""LoRAs, fused into a teacher's U-Net and text encoders by diffusers and peft: W + weight * alpha / rank * up @ down."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from koala.console import hide_loading_bars, say
from koala.errors import KoalaError, line_of
from koala.teacher.config import LoraPart
from koala.teacher.source import save_weights

PARTS = ("unet", "text_encoder", "text_encoder_2")
_DOWN = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight", ".lora_linear_layer.down.weight")


def fuse(folder: Path, loras: Sequence[LoraPart]) -> None:
    """Fuse `loras`, in order, into the weights of the pipeline in `folder`; each part keeps its dtype.

    Raises KoalaError for a LoRA that diffusers cannot read, that has keys for none of the pipeline's modules, or whose
    shapes are those of another model.
    """
    import torch
    from diffusers import StableDiffusionXLPipeline

    hide_loading_bars()
    dtypes = {part: _dtype(folder / part) for part in PARTS}
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder,
        vae=None,
        dtype={**dtypes, "default": torch.float32},
        use_safetensors=True,
        local_files_only=True,
        add_watermarker=False,
    )
    changed = set()
    for lora in loras:
        changed.update(fuse_into(pipeline, lora))
    for part in changed:
        save_weights(getattr(pipeline, part), folder / part)


def fuse_into(pipeline: Any, lora: LoraPart) -> list[str]:
    """Fuse one LoRA into a pipeline; return the parts that it changes. Raises KoalaError as `fuse` does."""
    pairs = _pairs(lora.file)
    name = "lora"
    try:
        with _quiet():
            pipeline.load_lora_weights(
                str(lora.file.parent),
                weight_name=lora.file.name,
                adapter_name=name,
                local_files_only=True,
                use_safetensors=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, IndexError, AttributeError) as error:
        raise KoalaError(
            f"the LoRA {lora.file} does not fit the model ({line_of(error)}): choose one for SDXL's U-Net"
        ) from None
    used = {part: _adapted(getattr(pipeline, part), name) for part in PARTS}
    parts = [part for part in PARTS if used[part]]
    if not parts:
        raise KoalaError(
            f"none of the {pairs} modules of the LoRA {lora.file} is in the model: choose one for SDXL, under diffusers' "
            "or kohya's names"
        )
    count = sum(used.values())
    say(f"LoRA {lora.file}, weight {lora.weight:g}: {count} of {pairs} modules fused into {', '.join(parts)}")
    try:
        pipeline.fuse_lora(components=parts, lora_scale=lora.weight, safe_fusing=True, adapter_names=[name])
    except ValueError as error:
        raise KoalaError(
            f"the LoRA {lora.file} gives weights that are not finite ({line_of(error)}): leave it out"
        ) from None
    except RuntimeError as error:  # a bias for a layer that has none
        raise KoalaError(f"the LoRA {lora.file} cannot be fused ({line_of(error)}): leave it out") from None
    pipeline.unload_lora_weights()
    return parts


def _pairs(file: Path) -> int:
    """Return how many modules a LoRA has weights for.

    Raises KoalaError if the file cannot be read, or holds a DoRA, whose magnitudes diffusers would leave out.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise KoalaError(f"the LoRA {file} is not a safetensors file ({error}): fetch it again") from None
    if any("dora_scale" in name for name in names):
        raise KoalaError(f"{file} is a DoRA (it holds dora_scale), which koala cannot fuse: choose a LoRA")
    return sum(name.endswith(_DOWN) for name in names)


def _adapted(model: Any, adapter: str) -> int:
    """Return how many modules of `model` have weights of the adapter."""
    return sum(adapter in module.lora_A for module in model.modules() if hasattr(module, "lora_A"))


def _dtype(folder: Path) -> Any:
    """Return the widest dtype of the weights in a part's folder."""
    import torch
    from safetensors import safe_open

    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in list(tensors.keys())}
    kinds = {"F16": torch.float16, "BF16": torch.bfloat16}
    return kinds[found.pop()] if len(found) == 1 and found <= set(kinds) else torch.float32


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what diffusers says, in several lines, of keys that it does not use: the count is said instead."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
