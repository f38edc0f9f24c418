"""One U-Net's measurement for `koala bench infer`, in a separate process (koala.bench.runner)."""

import statistics
import time
from typing import Any, get_args

import torch
from diffusers import StableDiffusionXLPipeline

from koala.bench import runner
from koala.bench.device import PeakMemory, describe, matmul_peak, synchronize
from koala.bench.models import random_sdxl, random_tokens
from koala.distill.config import Compiled
from koala.distill.hooks import compile_modules
from koala.distill.text import TextConditioner
from koala.evaluate.latency import step_latency
from koala.generate import device as default_device
from koala.unet.reference import TEXT_TOKENS

GUIDANCE = 7.5
_CONTEXT_GIB = 0.5  # what CUDA takes for itself of a card
_REPEATS = {"cuda": (20, 3), "cpu": (3, 1)}  # of a step, of a generation


def measure(
    unet: dict[str, Any], size: int, steps: int, dtype: str, compile: bool, limit_gib: int | None
) -> runner.Figures:
    """Return one U-Net's figures. With `limit_gib`, hold it to a card of that memory, and see only whether it fits."""
    device = default_device()
    if limit_gib:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((limit_gib - _CONTEXT_GIB) * 2**30 / total)
    kind = getattr(torch, dtype)
    peak, memory = None if limit_gib else matmul_peak(kind), PeakMemory()
    models = random_sdxl(unet, device, kind)
    models.set_progress_bar_config(disable=True)
    if compile:
        compile_modules(models.unet, get_args(Compiled))
    memory.restart()
    if limit_gib:
        _generate(models, size, 2)
        return {}
    repeats, generations = _REPEATS[device.type]
    step = step_latency(models.unet, TEXT_TOKENS, batch=2, repeats=repeats)
    _generate(models, size, 1)
    return {
        "step_seconds": step,
        "generation_seconds": statistics.median(_generate(models, size, steps) for _ in range(generations)),
        "peak_bytes": memory.bytes(),
        "matmul_flops_per_second": peak,
        "where": describe(),
    }


@torch.no_grad()
def _generate(models: StableDiffusionXLPipeline, size: int, steps: int) -> float:
    """Return the seconds from a caption's tokens to an image."""
    tokens = random_tokens(models.text_encoder.config, 1).to(models.device)
    text = TextConditioner(models)
    synchronize()
    start = time.perf_counter()
    states, pooled = text(tokens, torch.ones(1, dtype=torch.bool, device=models.device))
    models(
        prompt_embeds=states,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=torch.zeros_like(states),
        negative_pooled_prompt_embeds=torch.zeros_like(pooled),
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        height=size,
        width=size,
    )
    synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    runner.answer(measure)
