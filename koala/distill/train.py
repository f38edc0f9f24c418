"""Distillation, from a student's folder to its trained U-Net. accelerate starts one process a device.

    accelerate launch --config_file infra/accelerate/cpu.yaml -m koala.distill.train STATE/job.json

`koala distill koala-700m` does that and the rest of the stage (koala.distill.distill).
"""

import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from koala.console import hide_loading_bars, progress, say
from koala.data.captions.mixed import NewCaptions
from koala.data.latents import LatentSet
from koala.distill import checkpoint, curves, data, float8, held_out, sharding
from koala.distill.config import DistillConfig
from koala.distill.features import feature_pairs
from koala.distill.job import COMPLAINT, UNET, Job, checkpoints
from koala.distill.memory import advice, estimate
from koala.distill.optimizer import learning_rate
from koala.distill.task import DistillTask
from koala.distill.text import TextConditioner
from koala.distill.trainer import Trainer
from koala.distill.validation import validate
from koala.errors import KoalaError
from koala.unet.blocks import Stage
from koala.unet.student import read_stages


class StopSignal:
    """Whether this process has received SIGTERM or Ctrl-C."""

    received = False


def train(job: Job, stop: StopSignal) -> None:
    """Train the student and leave its U-Net in `job.state`/unet.

    Resumes from the newest checkpoint in `job.state`. Only the main process writes. Raises SystemExit(143) after a stop
    signal, once the state is saved, and KoalaError where the gradient stays non-finite.
    """
    config, state = job.config, job.state
    hide_loading_bars()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),  # rank 0 writes tens of gigabytes while the others wait
        ],
    )
    is_main = accelerator.is_main_process
    if config.teacher_float8:
        float8.check(accelerator.device)

    # Student, teacher and losses; the optimizer; the EMA of the student, which is what will be released.
    teacher = load_teacher(job, with_vae=is_main)
    task = build_task(job, teacher)
    trainer = Trainer(task, config, accelerator)

    # Resume where an earlier run stopped. What a step sees follows from its index, so there is nothing else to restore.
    done, bad_steps, saved_step = 0, 0, -1
    if saved := checkpoints(state):
        restored = checkpoint.load(saved[-1], trainer.student, trainer.optimizer, trainer.ema)
        done, bad_steps = restored["step"], restored["bad_steps"]
        saved_step = done
        if done > config.steps:
            raise KoalaError(
                f"{state} holds a run of {done} steps already: set distill.steps to {done} or more, or remove the folder"
            )
    latents = LatentSet(job.latents)
    trained_on, kept_out = held_out.split(latents, config)
    train_timesteps = task.scheduler.config.num_train_timesteps
    batches = data.load(
        latents,
        trained_on,
        config,
        task.text.tokenize,
        train_timesteps,
        trainer.micro_batch,
        accelerator.process_index,
        accelerator.num_processes,
        start=done,
        device=accelerator.device,
        new_captions=NewCaptions(job.new_captions) if job.new_captions else None,
    )
    if is_main:
        curves.truncate(state, done)
        _say_what_starts(accelerator, job, trained_on, done)

    def save() -> None:
        nonlocal saved_step
        if done == saved_step:
            return  # a kill while the same state replaced it could leave no checkpoint
        # Ranks that left before rank 0 has written would have the launcher kill it in the middle.
        keep, extra = config.machine.keep_checkpoints, {"bad_steps": bad_steps}
        checkpoint.save(state, done, trainer.student, trainer.optimizer, trainer.ema, extra, keep, write=is_main)
        accelerator.wait_for_everyone()
        saved_step = done

    def leave() -> None:
        save()
        if is_main:
            say(f"distill: stopped at step {done}, saved; the same command resumes from there")
        raise SystemExit(128 + signal.SIGTERM)

    clock, clock_step = time.monotonic(), done
    for micro_batches in progress(batches, "distill", config.steps, done) if is_main else batches:
        # Forward and backward over this process's share of the batch; gradients are all-reduced in its last micro-batch.
        losses, samples = [], []
        for index, batch in enumerate(micro_batches, start=1):
            terms = trainer.backward(batch, last=index == trainer.accumulate)
            losses.append(torch.stack(list(terms.values())))
            samples.append(batch.samples)
            if stop.received and accelerator.num_processes == 1:
                leave()  # the unfinished step is left to the next run, which sees the same data and noise

        # One optimizer step, unless the gradient is not finite.
        rate = learning_rate(config, done)
        norm = trainer.update(rate)
        if math.isfinite(norm):
            bad_steps = 0
        else:
            bad_steps += 1
            culprit = _culprit(accelerator, list(terms), losses, samples, latents)
            if is_main:
                say(f"distill: step {done + 1} is skipped: {culprit}")
        done += 1

        # Measure the losses on samples that are kept out of training; all processes share them.
        validates = done % config.machine.validate_every == 0 or done == config.steps
        measured, paused = {}, time.monotonic()
        if validates and kept_out:
            tokenize = task.text.tokenize
            measured = held_out.measure(trainer, latents, kept_out, config, tokenize, train_timesteps, accelerator)

        # Generate validation images, on the main process. Before the losses: what shows a step's losses has its images.
        if validates and config.sampling.prompts:
            unet = trainer.released(getattr(torch, config.teacher_dtype), keep=is_main)
            if unet is not None:
                validate(done, teacher, unet, config, state, accelerator.device)
            del unet
            accelerator.wait_for_everyone()
        clock += time.monotonic() - paused

        # Log each loss term (the mean over the batch, all processes) and the speed since the last logged step, validation left out.
        if done % config.machine.log_every == 0 or done == config.steps or measured:
            values = accelerator.reduce(torch.stack(losses).mean(0), "mean").tolist()
            if is_main:
                now = time.monotonic()
                speed = (done - clock_step) * config.batch_size / max(now - clock, 1e-9)
                clock, clock_step = now, done
                row = dict(zip((f"loss/{term}" for term in terms), values, strict=True))
                row |= {"gradient_norm": norm, "learning_rate": rate, "bad_steps": float(bad_steps)}
                curves.append(state, done, {**row, **measured, curves.SPEED: speed})

        # Save now and then; stop where a signal or a run of bad steps says so, on all ranks at once.
        failed = bad_steps >= config.machine.max_bad_steps
        if _stopped_anywhere(accelerator, stop):
            leave()
        if done % config.machine.checkpoint_every == 0 or failed or done == config.steps:
            save()
        if failed:
            raise KoalaError(
                f"distillation stopped at step {done}: {bad_steps} steps in a row with a non-finite gradient; "
                f"in the last, {culprit}; the state is saved in {state}; lower distill.learning_rate, or look at those samples"
            )

    final = trainer.released(torch.float32, keep=is_main)
    if final is not None:
        final.save_pretrained(state / f"{UNET}.partial", safe_serialization=True)
        (state / f"{UNET}.partial").rename(state / UNET)
    accelerator.end_training()


def load_teacher(job: Job, with_vae: bool) -> StableDiffusionXLPipeline:
    """Load the teacher's pipeline in the dtype that training uses; only validation needs the VAE."""
    left_out = {} if with_vae else {"vae": None}
    return StableDiffusionXLPipeline.from_pretrained(
        job.teacher,
        dtype=getattr(torch, job.config.teacher_dtype),
        use_safetensors=True,
        local_files_only=True,
        add_watermarker=False,
        **left_out,
    )


def build_task(job: Job, teacher: StableDiffusionXLPipeline) -> DistillTask:
    """Return the student as its stage built it, and the teacher, ready to be trained."""
    student = UNet2DConditionModel.from_pretrained(
        job.student, subfolder="unet", use_safetensors=True, local_files_only=True
    )
    text = TextConditioner(teacher)
    return assemble(student, teacher.unet, text, teacher.scheduler.config, read_stages(job.student), job.config)


def assemble(
    student: UNet2DConditionModel,
    teacher: UNet2DConditionModel,
    text: TextConditioner,
    noise: Mapping[str, object],
    stages: Sequence[Stage],
    config: DistillConfig,
) -> DistillTask:
    """Return the task of these models as the recipe computes it. `noise` is the configuration of the teacher's scheduler."""
    if config.machine.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    dtype = getattr(torch, config.teacher_dtype)
    teacher.to(dtype)
    text.to(dtype)
    if config.teacher_float8:
        float8.convert(teacher)
    if config.machine.channels_last:
        student.to(memory_format=torch.channels_last)
        teacher.to(memory_format=torch.channels_last)
    # The teacher's own scheduler samples; noise is added as it was trained.
    scheduler = DDPMScheduler.from_config(noise)
    return DistillTask(student, teacher, text, scheduler, feature_pairs(config.features, stages), config)


def _say_what_starts(accelerator: Accelerator, job: Job, trained_on: data.Buckets, done: int) -> None:
    if done:
        say(f"distill: resuming from step {done}")
    if small := data.too_small(trained_on, job.config.batch_size):
        names = ", ".join(f"{height}x{width} ({count})" for (height, width), count in small.items())
        say(
            f"distill: buckets of fewer samples than batch_size {job.config.batch_size} repeat them in a batch: {names}"
        )
    if accelerator.device.type == "cuda":  # it takes seconds, and a CPU's memory is the host's
        say(f"distill: memory, by estimate: {estimate(job).line()}")
    shards = ", the student sharded over them" if sharding.requested() else ""
    say(f"distill: {accelerator.num_processes} processes on {accelerator.device.type}{shards}")


def _culprit(
    accelerator: Accelerator, names: Sequence[str], losses: list[Tensor], samples: list[Tensor], latents: LatentSet
) -> str:
    """Return what was not finite in a step over all processes: the first such term, and its micro-batches' samples."""
    values = accelerator.gather(torch.stack(losses))
    indices = accelerator.gather(torch.stack(samples))
    bad = ~torch.isfinite(values[:, 1:])
    if not bad.any():
        return "every loss is finite, their gradient is not"
    term = names[1:][int(bad.any(0).nonzero()[0])]
    keys = latents.keys(indices[bad.any(1)].flatten().tolist())
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    return f"the term {term} is not finite for samples {', '.join(keys[:8])}{more}"


@contextmanager
def stop_on_signal() -> Iterator[StopSignal]:
    """Set a flag on SIGTERM and Ctrl-C instead of dying, inside the block."""
    stop = StopSignal()

    def receive(_signal: int, _frame: object) -> None:
        stop.received = True

    previous = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stopped_anywhere(accelerator: Accelerator, stop: StopSignal) -> bool:
    """Return True on every rank once any rank has received a stop signal. A single process skips the collective."""
    if accelerator.num_processes == 1:
        return stop.received
    if stop.received:
        accelerator.set_trigger()
    return bool(accelerator.check_trigger())


def main(file: Path) -> None:
    """Run one training process. What the user must fix goes to `complaint` in the state folder, and the status is 2."""
    job = Job.read(file)
    try:
        with stop_on_signal() as stop:
            train(job, stop)
    except torch.OutOfMemoryError:
        needed = estimate(job).line()
        line = f"out of memory; the estimate was {needed}: {advice(job.config)}, and the run resumes from its last checkpoint"
    except KoalaError as error:
        line = str(error)
    else:
        return
    # The launcher turns every status into 1: the stage reads the line here. Any rank may be the one that runs out.
    (file.parent / COMPLAINT).write_text(line)
    sys.exit(2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
