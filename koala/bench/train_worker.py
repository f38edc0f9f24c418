"""One recipe's measurement for `koala bench train`, in a separate process (koala.bench.runner)."""

import math
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
from koala.data.latents import LatentSet
from koala.distill import data, float8, launch_settings
from koala.distill.config import DistillConfig
from koala.distill.optimizer import learning_rate
from koala.distill.text import TextConditioner
from koala.distill.train import assemble
from koala.distill.trainer import Trainer
from koala.errors import KoalaError
from koala.params import load
from koala.unet.blocks import Stage, keep
from koala.unet.cost import unet_cost
from koala.unet.student import build_student

_WARM_UP = 4  # steps, an epoch of two batches a bucket: every shape is compiled before time is taken


@dataclass(frozen=True)
class _Setup:
    """What both recipes are made of."""

    models: StableDiffusionXLPipeline
    student: UNet2DConditionModel
    stages: Sequence[Stage]
    config: DistillConfig
    accelerator: Accelerator
    buckets: Sequence[tuple[int, int]]
    """Height and width, px."""
    folder: Path
    """For encoded samples."""


_Prepared = tuple[Any, Iterator[Iterator[Any]]]
"""A trainer with koala.distill.trainer.Trainer's two halves of a step, and the micro-batches of every step."""


def measure(name: str, student: str, profile: str, machine: str, steps: int, changes: dict[str, Any]) -> runner.Figures:
    """Return one variant's figures. `changes` are values of the recipe or of the machine's settings.

    Raises KoalaError for a gradient that is not finite: such a step is fast, and wrong.
    """
    params = load(profile=profile, machine=machine)
    config = _changed(params.distill(student), {**changes, "steps": _WARM_UP + steps})
    precision = launch_settings.check(config).mixed_precision
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)
    if config.teacher_float8:
        float8.check(accelerator.device)
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    memory, watch = PeakMemory(), Stopwatch()
    dtype = half if name == runner.PLAIN else getattr(torch, config.teacher_dtype)
    models = random_pipeline(params.recipe.teacher, accelerator.device, dtype)
    rule = params.student(student).unet
    unet = build_student(models.unet, rule).float()
    buckets = params.recipe.encode.buckets[:2]
    stages = keep(models.unet.config, rule)
    flops = _flops(models, unet, buckets)
    watch.around(models.unet, "encoders", "teacher")
    watch.around(unet, "teacher", "student")
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        prepare = _plain if name == runner.PLAIN else _ours
        # Nothing here keeps what the recipe does not: ours lets go of the VAE.
        setup = _Setup(models, unet, stages, config, accelerator, buckets, Path(folder) / "latents")
        trainer, batches = prepare(setup)
        del models, unet, setup
        for step, micro_batches in enumerate(batches):
            if step == _WARM_UP:
                memory.restart()
                watch.clear()
            synchronize()
            begin = time.perf_counter()
            watch.start()
            for index, batch in enumerate(micro_batches, start=1):
                watch.mark("data")
                trainer.backward(batch, last=index == trainer.accumulate)
                watch.mark("backward")
            norm = trainer.update(learning_rate(config, step))
            watch.mark("optimizer")
            synchronize()
            seconds.append(time.perf_counter() - begin)
            if not math.isfinite(norm):
                raise KoalaError(
                    f"bench train: {name}: the gradient of step {step + 1} is not finite: lower learning_rate"
                )
    most = memory.bytes()
    timed = seconds[_WARM_UP:]
    images = config.batch_size * len(timed)
    return {
        "micro_batch": launch_settings.micro_batch(config, 1),
        "batch_size": config.batch_size,
        "buckets": [list(bucket) for bucket in buckets],
        "images_per_second": images / sum(timed),
        "step_seconds": timed,
        "warm_up_seconds": seconds[:_WARM_UP],
        "flops_per_image": flops,
        "matmul_flops_per_second": matmul_peak(half),
        "peak_bytes": most,
        "seconds_per_image": {part: spent / images for part, spent in watch.seconds().items()},
        "precision": precision,
        "where": describe(),
    }


def _changed(config: DistillConfig, changes: dict[str, Any]) -> DistillConfig:
    own = {name: value for name, value in changes.items() if name in type(config).model_fields}
    of_machine = {name: value for name, value in changes.items() if name not in own}
    return config.model_copy(update={**own, "machine": config.machine.model_copy(update=of_machine)})


def _flops(models: StableDiffusionXLPipeline, student: UNet2DConditionModel, buckets: Sequence[tuple[int, int]]) -> int:
    """Return the FLOPs of an image at the first bucket: the buckets have nearly the same number of pixels."""
    side = round(math.sqrt(math.prod(buckets[0]))) // models.vae_scale_factor
    return unet_cost(models.unet.config, side).flops + 3 * unet_cost(student.config, side).flops


def _plain(setup: _Setup) -> _Prepared:
    blocks = [stage.path for stage in setup.stages]
    models, device = setup.models, setup.accelerator.device
    trainer = plain.PlainTrainer(models, setup.student, blocks, setup.config, device, half=models.unet.dtype)
    return trainer, plain.load(models.text_encoder.config, setup.buckets[0][0], setup.config)


def _ours(setup: _Setup) -> _Prepared:
    models, config = setup.models, setup.config
    random_latents(setup.folder, dict.fromkeys(setup.buckets, 2 * config.batch_size), models.vae_scale_factor)
    tokens = models.text_encoder.config
    text = TextConditioner(models)
    task = assemble(setup.student, models.unet, text, models.scheduler.config, setup.stages, config)
    trainer = Trainer(task, config, setup.accelerator)
    latents = LatentSet(setup.folder)
    batches = data.load(
        latents,
        latents.buckets,
        config,
        lambda captions: random_tokens(tokens, len(captions)),
        task.scheduler.config.num_train_timesteps,
        trainer.micro_batch,
        rank=0,
        processes=1,
        start=0,
        device=setup.accelerator.device,
    )
    return trainer, batches


if __name__ == "__main__":
    runner.answer(measure)
