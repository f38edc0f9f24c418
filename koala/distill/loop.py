"""Distillation, from a student's folder to its trained U-Net. Started by accelerate, one process a device:

    accelerate launch --config_file infra/accelerate/cpu.yaml -m koala.distill.loop koala-700m

`koala distill koala-700m` does that and the rest of the stage (koala.distill.launch).
"""

import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor

from koala import config as configuration
from koala.config import Params
from koala.console import hide_loading_bars, progress, say
from koala.data.latents import LatentSet
from koala.distill import batches, checkpoint, float8, history, sharding
from koala.distill.conditioning import TextConditioner
from koala.distill.config import DistillConfig
from koala.distill.features import feature_pairs
from koala.distill.learner import Learner
from koala.distill.memory import advice, estimate
from koala.distill.optimizer import learning_rate
from koala.distill.task import DistillTask
from koala.distill.validation import validation_grid
from koala.errors import KoalaError
from koala.tracking import StageRun
from koala.unet.blocks import Stage, keep
from koala.unet.build import empty_unet

RUN_ID, WORK = "KOALA_RUN_ID", "KOALA_WORK"  # what koala.distill.launch tells the processes
COMPLAINT = "complaint"  # and the file in which they tell it what the user must mend


def train(params: Params, name: str, work: Path, run: StageRun | None) -> None:
    """Train the student `name` and leave its U-Net in `work`/unet.

    Goes on from the newest checkpoint in `work`. The main process alone writes, and tells `run` of it where it is given
    one. Raises SystemExit(143) after SIGTERM or Ctrl-C, once the state is saved, and KoalaError where the gradient stays
    non-finite, where memory runs out, and where the checkpoint is of another configuration.
    """
    recipe = params.distill
    hide_loading_bars()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    is_main, sharded = accelerator.is_main_process, sharding.asked()
    stopping = _stop_on_signal()
    check(recipe, accelerator, sharded)

    # Student, teacher and losses; the optimiser; the moving average of the student, which is what will be released.
    teacher = StableDiffusionXLPipeline.from_pretrained(
        params.need("teacher"), use_safetensors=True, local_files_only=True
    )
    task = build_task(params, name, teacher)
    learner = Learner(task, recipe, accelerator)
    student, optimizer, average = learner.student, learner.optimizer, learner.average

    # Go on where an earlier run stopped. What a step sees follows from its number, so that is all there is to restore.
    done, bad_steps = 0, 0
    if saved := checkpoint.checkpoints(work):
        state = checkpoint.load(saved[-1], student, optimizer, average, recipe.learnt())
        done, bad_steps = state["step"], state["bad_steps"]
        if is_main:
            say(f"distill: going on from step {done}")
    if is_main:
        history.truncate(work, done)
    # After a SIGKILL some steps are done a second time, with the same losses: MLflow knows them already.
    told = run.last_step("loss/total") if run else done
    latents = LatentSet(params.need("encode"))
    data = batches.load(
        latents,
        recipe,
        task.text.tokenize,
        task.scheduler.config.num_train_timesteps,
        accelerator.process_index,
        accelerator.num_processes,
        start=done,
        device=accelerator.device,
    )
    clock, clock_step = time.monotonic(), done
    if is_main:
        say(f"distill: memory, by estimate: {estimate(params, name).line()}")
        spread = ", the student spread over them" if sharded else ""
        say(f"distill: {accelerator.num_processes} processes on {accelerator.device.type}{spread}")

    def save() -> None:
        state = {"bad_steps": bad_steps, "learnt": recipe.learnt()}
        checkpoint.save(work, done, student, optimizer, average, state, recipe.keep_checkpoints, write=is_main)

    def leave() -> None:
        # A signal in the middle of a step leaves that step to the next run: it will see the same data and noise.
        save()
        if is_main:
            say(f"distill: stopped at step {done}, saved; the same command goes on from there")
        raise SystemExit(128 + signal.SIGTERM)

    for micro_batches in progress(data, f"distill {name}", recipe.steps, done) if is_main else data:
        # Forward and backward over this process's share of the batch; gradients meet in its last micro-batch.
        losses, numbers = [], []
        for number, batch in enumerate(micro_batches, start=1):
            terms = learner.backward(batch, number)
            losses.append(torch.stack(list(terms.values())))
            numbers.append(batch.numbers)
            if _told_to_stop(accelerator, stopping):
                leave()

        # One step of the optimiser, unless the gradient is not finite.
        rate = learning_rate(recipe, done)
        norm = learner.update(rate)
        if math.isfinite(norm):
            bad_steps = 0
        else:
            bad_steps += 1
            culprit = _culprit(accelerator, list(terms), losses, numbers, latents)
            if is_main:
                say(f"distill: step {done + 1} is skipped: {culprit}")
        done += 1

        # Tell MLflow each term by itself (the mean over the batch, all processes) and the speed since last time.
        if done % recipe.log_every == 0 or done == recipe.steps:
            values = accelerator.reduce(torch.stack(losses).mean(0), "mean").tolist()
            if is_main:
                row = dict(zip((f"loss/{term}" for term in terms), values, strict=True))
                row |= {"gradient_norm": norm, "learning_rate": rate, "bad_steps": float(bad_steps)}
                history.append(work, done, row)
            if run and done > told:
                now = time.monotonic()
                speed = (done - clock_step) * recipe.batch_size / max(now - clock, 1e-9)
                clock, clock_step = now, done
                run.metrics({**row, "images_per_second": speed}, step=done)

        # Let a person see what the student draws.
        if recipe.validation_prompts and (done % recipe.validate_every == 0 or done == recipe.steps):
            drawn = released(student, average)
            if run:
                run.image(validation_grid(teacher, drawn.to(accelerator.device), recipe), "validation", done)

        # Save now and then.
        failed = bad_steps >= recipe.max_bad_steps
        if done % recipe.checkpoint_every == 0 or failed:
            save()
        if failed:
            raise KoalaError(
                f"distillation stopped at step {done}: {bad_steps} steps in a row with a non-finite gradient; "
                f"in the last, {culprit}; the state is saved in {work}; lower distill.learning_rate, or look at those samples"
            )

    final = released(student, average)
    if is_main:
        final.save_pretrained(work / "unet.partial", safe_serialization=True)
        (work / "unet.partial").rename(work / "unet")
    accelerator.end_training()


def build_task(params: Params, name: str, teacher: StableDiffusionXLPipeline) -> DistillTask:
    """The student as its stage built it, and the teacher, ready to be trained."""
    recipe = params.distill
    stages = keep(teacher.unet.config, params.student(name))
    folder = params.need("student", name)
    student = UNet2DConditionModel.from_pretrained(
        folder, subfolder="unet", use_safetensors=True, local_files_only=True
    )
    return assemble(student, teacher.unet, TextConditioner(teacher), teacher.scheduler.config, stages, recipe)


def assemble(
    student: UNet2DConditionModel,
    teacher: UNet2DConditionModel,
    text: TextConditioner,
    noise: Mapping[str, object],
    stages: Sequence[Stage],
    recipe: DistillConfig,
) -> DistillTask:
    """The task of these models as the recipe computes it. noise: the configuration of the teacher's scheduler."""
    if recipe.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    dtype = getattr(torch, recipe.teacher_dtype)
    teacher.to(dtype)
    text.to(dtype)
    if recipe.teacher_float8:
        float8.convert(teacher)
    if recipe.channels_last:
        student.to(memory_format=torch.channels_last)
        teacher.to(memory_format=torch.channels_last)
    # The teacher's own scheduler samples; noise is added as it was trained.
    scheduler = DDPMScheduler.from_config(noise)
    return DistillTask(student, teacher, text, scheduler, feature_pairs(recipe.features, stages), recipe)


def released(student: UNet2DConditionModel, average: EMAModel | None) -> UNet2DConditionModel:
    """The U-Net to draw with and to release: of the moving average where there is one. Every process must ask."""
    tensors = checkpoint.average_weights(student, average) if average else dict(student.named_parameters())
    unet = empty_unet(student.config)
    unet.load_state_dict({name: sharding.whole(tensor.detach()) for name, tensor in tensors.items()}, assign=True)
    return unet.eval()


def check(recipe: DistillConfig, accelerator: Accelerator, sharded: bool) -> None:
    """Raises KoalaError for what this machine, or the way of launching, cannot do of the recipe."""
    if accelerator.mixed_precision == "fp16":
        raise KoalaError(
            f"{recipe.launch} asks for fp16, whose range the losses leave: set mixed_precision to bf16 or no"
        )
    if recipe.teacher_float8:
        float8.check(accelerator.device)
    if sharded and (recipe.optimizer != "adamw" or recipe.ema_offload):
        raise KoalaError(
            "FSDP2 spreads optimiser and average already: set distill.optimizer to adamw, ema_offload to false"
        )


def _culprit(
    accelerator: Accelerator, names: Sequence[str], losses: list[Tensor], numbers: list[Tensor], data: LatentSet
) -> str:
    """What was not finite in a step over all processes: the first such term, and the samples of its micro-batches."""
    values = accelerator.gather(torch.stack(losses))
    samples = accelerator.gather(torch.stack(numbers))
    bad = ~torch.isfinite(values[:, 1:])
    if not bad.any():
        return "every loss is finite, their gradient is not"
    term = names[1:][int(bad.any(0).nonzero()[0])]
    keys = data.keys(samples[bad.any(1)].flatten().tolist())
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    return f"the term {term} is not finite for samples {', '.join(keys[:8])}{more}"


class _Flag:
    is_set = False


def _stop_on_signal() -> _Flag:
    flag = _Flag()

    def stop(_signal: int, _frame: object) -> None:
        flag.is_set = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    return flag


def _told_to_stop(accelerator: Accelerator, flag: _Flag) -> bool:
    """Whether any process was: all get the same answer at the same time. One alone need not wait for its device."""
    if accelerator.num_processes == 1:
        return flag.is_set
    if flag.is_set:
        accelerator.set_trigger()
    return accelerator.check_trigger()


def main(name: str) -> None:
    """One training process: rank 0 tracks it."""
    params = configuration.load()
    first = os.environ.get("RANK", "0") == "0"
    run_id = os.environ.get(RUN_ID)
    try:
        train(params, name, Path(os.environ[WORK]), StageRun(run_id) if first and run_id else None)
    except torch.OutOfMemoryError:
        needed = estimate(params, name).line()
        line = f"out of memory; the estimate was {needed}: {advice(params.distill)}, and the run goes on from its last checkpoint"
    except KoalaError as error:
        line = str(error)
    else:
        return
    # The launcher turns every status into 1: the stage reads the line here. Any process may be the one without memory.
    Path(os.environ[WORK], COMPLAINT).write_text(line)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1])
