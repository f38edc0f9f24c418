"""What a model costs: parameters, FLOPs, bytes, the time of a step and of a whole image, memory.

One model is in memory at a time: the U-Nets alone for a step, then the pipelines for an image.
"""

import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from koala import generate
from koala.evaluate.config import EvaluateConfig, SamplingConfig

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

Costs = dict[str, float]
"""`unet_parameters`, `unet_flops` of a step of one image, `disk_bytes` of all weights, `step_ms`, `image_ms` with text encoders and
VAE, and on a GPU `peak_bytes`, the memory that an image takes, weights included."""

_IMAGES = 3  # timed images at most, after one that is not
_PROMPT = "a photograph of a red fox in the snow"


def costs(teacher: Path, student: Path, config: EvaluateConfig) -> tuple[Costs, Costs]:
    """Measure the teacher and the student.

    The teacher's step is timed before and after the student's, so that a machine whose speed drifts does not favour one.
    """
    tokens = json.loads((teacher / "text_encoder" / "config.json").read_text())["max_position_embeddings"]
    first, own, last = (_step_ms(folder, tokens, config) for folder in (teacher, student, teacher))
    return (
        _count(teacher) | {"step_ms": (first + last) / 2} | _of_pipeline(teacher, config),
        _count(student) | {"step_ms": own} | _of_pipeline(student, config),
    )


def _step_ms(folder: Path, tokens: int, config: EvaluateConfig) -> float:
    from koala.evaluate.latency import step_latency

    unet = _load_unet(folder, config.dtype)
    seconds = step_latency(unet, tokens, config.latency_batch, config.machine.latency_repeats)
    del unet
    generate.free_memory()  # before the next is loaded
    return 1000 * seconds


def _count(folder: Path) -> Costs:
    from koala.unet.cost import unet_cost

    unet = json.loads((folder / "unet" / "config.json").read_text())
    cost = unet_cost(unet, unet["sample_size"])
    return {"unet_parameters": cost.parameters, "unet_flops": cost.flops}


def _of_pipeline(folder: Path, config: EvaluateConfig) -> Costs:
    import torch

    pipeline = generate.load(folder, config.dtype)
    on_gpu = generate.device().type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    found = {
        "disk_bytes": float(sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))),
        "image_ms": 1000 * _image_seconds(pipeline, config.sampling, min(_IMAGES, config.machine.latency_repeats)),
    }
    if on_gpu:
        found["peak_bytes"] = float(torch.cuda.max_memory_allocated())
    del pipeline
    generate.free_memory()
    return found


def _image_seconds(pipeline: "StableDiffusionXLPipeline", sampling: SamplingConfig, repeats: int) -> float:
    """Return the median seconds of one image, with its text encoders and its VAE."""
    times = []
    for seed in range(repeats + 1):
        start = time.perf_counter()
        generate.generate(pipeline, [(_PROMPT, seed)], sampling)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _load_unet(folder: Path, dtype: str) -> "UNet2DConditionModel":
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(
        folder / "unet", torch_dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
    )
    return unet.eval().to(generate.device())
