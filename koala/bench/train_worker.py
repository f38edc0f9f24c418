"""One recipe's measurement for `koala bench train`, in a process of its own (koala.bench.runner)."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from koala.bench import plain, runner
from koala.bench.device import PeakMemory, Stopwatch, describe, matmul_peak, synchronize
from koala.bench.models import random_latents, random_pipeline, random_tokens
from koala.config import load
from koala.data.latents import LatentSet
from koala.distill import batches
from koala.distill.conditioning import TextConditioner
from koala.distill.config import DistillConfig
from koala.distill.learner import Learner
from koala.distill.loop import assemble, check
from koala.distill.memory import launch_settings
from koala.distill.optimizer import learning_rate
from koala.unet.blocks import Stage, keep
from koala.unet.build import build_student
from koala.unet.inspect import inspect

_WARM_UP = 2  # steps: compilation, the first sight of each shape


@dataclass(frozen=True)
class _Setup:
    """What both recipes are made of. size: px; folder: for encoded samples."""

    models: StableDiffusionXLPipeline
    student: UNet2DConditionModel
    stages: Sequence[Stage]
    recipe: DistillConfig
    accelerator: Accelerator
    size: int
    folder: Path


_Prepared = tuple[Any, Iterator[Iterator[Any]]]
"""A learner with koala.distill.learner.Learner's two halves of a step, and for every step its micro-batches."""


def measure(name: str, student: str, profile: str, steps: int, changes: dict[str, Any]) -> runner.Figures:
    """One variant's figures, in this process. changes: of the profile's recipe."""
    params = load(profile=profile)
    recipe = params.distill.model_copy(update={**changes, "steps": _WARM_UP + steps})
    precision = launch_settings(recipe).get("mixed_precision", "no")
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)
    check(recipe, accelerator, sharded=False)
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    memory, watch = PeakMemory(), Stopwatch()
    dtype = half if name == runner.PLAIN else getattr(torch, recipe.teacher_dtype)
    models = random_pipeline(params.teacher, accelerator.device, dtype)
    unet = build_student(models.unet, params.student(student)).float()
    size = max(min(bucket) for bucket in params.encode.buckets)
    side = size // models.vae_scale_factor
    flops = inspect(models.unet.config, side).flops + 3 * inspect(unet.config, side).flops
    stages = keep(models.unet.config, params.student(student))
    watch.around(models.unet, "encoders", "teacher")
    watch.around(unet, "teacher", "student")
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        prepare = _plain if name == runner.PLAIN else _ours
        # Nothing here keeps what the recipe does not: ours lets go of the VAE.
        learner, data = prepare(_Setup(models, unet, stages, recipe, accelerator, size, Path(folder) / "encode"))
        del models, unet
        for step, micro_batches in enumerate(data):
            if step == _WARM_UP:
                memory.restart()
                watch.clear()
            synchronize()
            begin = time.perf_counter()
            watch.start()
            for number, batch in enumerate(micro_batches, start=1):
                watch.mark("data")
                learner.backward(batch, number)
                watch.mark("backward")
            learner.update(learning_rate(recipe, step))
            watch.mark("optimizer")
            synchronize()
            seconds.append(time.perf_counter() - begin)
    most = memory.bytes()
    timed = seconds[_WARM_UP:]
    images = recipe.batch_size * len(timed)
    speed = images / sum(timed)
    return {
        "micro_batch": recipe.micro_batch,
        "batch_size": recipe.batch_size,
        "size": size,
        "images_per_second": speed,
        "step_seconds": timed,
        "warm_up_seconds": seconds[:_WARM_UP],
        "flops_per_image": flops,
        "matmul_flops_per_second": matmul_peak(half),
        "peak_bytes": most,
        "seconds_per_image": {part: spent / images for part, spent in watch.seconds().items()},
        "precision": precision,
        "where": describe(),
    }


def _plain(setup: _Setup) -> _Prepared:
    blocks = [stage.path for stage in setup.stages]
    models, device = setup.models, setup.accelerator.device
    learner = plain.PlainLearner(models, setup.student, blocks, setup.recipe, device, half=models.unet.dtype)
    return learner, plain.load(models.text_encoder.config, setup.size, setup.recipe)


def _ours(setup: _Setup) -> _Prepared:
    models, recipe = setup.models, setup.recipe
    buckets = {(setup.size, setup.size): 2 * recipe.batch_size}
    random_latents(setup.folder, buckets, models.vae_scale_factor)
    tokens = models.text_encoder.config
    text = TextConditioner(models)
    task = assemble(setup.student, models.unet, text, models.scheduler.config, setup.stages, recipe)
    data = batches.load(
        LatentSet(setup.folder),
        recipe,
        lambda captions: random_tokens(tokens, len(captions)),
        task.scheduler.config.num_train_timesteps,
        rank=0,
        processes=1,
        start=0,
        device=setup.accelerator.device,
    )
    return Learner(task, recipe, setup.accelerator), data


if __name__ == "__main__":
    runner.answer(measure)
