"""Distillation, from a student's folder to its trained U-Net. Started by accelerate, one process a device:

    accelerate launch --config_file infra/accelerate/cpu.yaml -m koala.distill.loop koala-700m

`koala distill koala-700m` does that and the rest of the stage (koala.distill.launch).
"""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image

from koala import config as configuration
from koala import pipeline
from koala.config import Params
from koala.console import hide_loading_bars, progress, say
from koala.data.latents import LatentSet
from koala.distill import batches, checkpoint, history
from koala.distill.conditioning import TextConditioner
from koala.distill.config import DistillConfig
from koala.distill.features import feature_pairs
from koala.distill.losses import total
from koala.distill.task import DistillTask
from koala.errors import KoalaError
from koala.grid import grid
from koala.tracking import StageRun
from koala.unet.blocks import keep

RUN_ID, WORK = "KOALA_RUN_ID", "KOALA_WORK"  # what koala.distill.launch tells the processes
COMPLAINT = "complaint"  # and the file in which they tell it what the user must mend


def train(params: Params, name: str, work: Path, run: StageRun | None) -> None:
    """Train the student `name` and leave its U-Net in `work`/unet.

    Goes on from the newest checkpoint in `work`. The main process alone writes, and tells `run` of it where it is given
    one. Raises SystemExit(143) after SIGTERM or Ctrl-C, once the state is saved, and KoalaError where the gradient stays
    non-finite.
    """
    recipe = params.distill
    hide_loading_bars()
    accelerator = Accelerator(step_scheduler_with_optimizer=False)
    is_main = accelerator.is_main_process
    stopping = _stop_on_signal()

    # Student, teacher and losses; the moving average of the student is what will be released.
    teacher = StableDiffusionXLPipeline.from_pretrained(
        params.need("teacher"), use_safetensors=True, local_files_only=True
    )
    task = build_task(params, name, teacher).to(accelerator.device)
    student = task.student
    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    average = EMAModel(parameters, decay=recipe.ema_decay, foreach=True) if recipe.ema_decay else None

    # Go on where an earlier run stopped. What a step sees follows from its number, so that is all there is to restore.
    done, bad_steps = 0, 0
    if saved := checkpoint.checkpoints(work):
        state = checkpoint.load(saved[-1], student, optimizer, average)
        done, bad_steps = state["step"], state["bad_steps"]
        if is_main:
            say(f"distill: going on from step {done}")
    if is_main:
        history.truncate(work, done)
    data = batches.load(
        LatentSet(params.need("encode")),
        recipe,
        task.text.tokenize,
        task.scheduler.config.num_train_timesteps,
        accelerator.process_index,
        accelerator.num_processes,
        start=done,
    )
    if recipe.compile:
        student.compile()
    wrapped, optimizer = accelerator.prepare(task, optimizer)
    weights = recipe.weights.model_dump()
    clock, clock_step = time.monotonic(), done

    for micro_batches in progress(data, f"distill {name}", recipe.steps, done) if is_main else data:
        # Forward and backward over this process's share of the batch; gradients meet in its last micro-batch.
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
                terms = wrapped(batch.to(accelerator.device))
                loss = total(terms, weights)
                accelerator.backward(loss / len(micro_batches))

        # One step of the optimiser, unless the gradient is not finite.
        norm = accelerator.clip_grad_norm_(parameters, recipe.max_grad_norm)
        rate = learning_rate(recipe, done)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if torch.isfinite(norm):
            optimizer.step()
            bad_steps = 0
            if average:
                average.step(parameters)
        else:
            bad_steps += 1
        optimizer.zero_grad()
        done += 1

        # Tell MLflow each term by itself (the last micro-batch's, over all processes) and the speed since last time.
        if done % recipe.log_every == 0 or done == recipe.steps:
            values = accelerator.reduce(
                torch.stack([loss.detach(), *(term.detach() for term in terms.values())]), "mean"
            )
            if is_main:
                row = dict(zip(("loss/total", *(f"loss/{term}" for term in terms)), values.tolist(), strict=True))
                row |= {"gradient_norm": norm.item(), "learning_rate": rate, "bad_steps": float(bad_steps)}
                history.append(work, done, row)
            if run:
                now = time.monotonic()
                speed = (done - clock_step) * recipe.batch_size / max(now - clock, 1e-9)
                clock, clock_step = now, done
                run.metrics({**row, "images_per_second": speed}, step=done)

        # Let a person see what the student draws.
        if run and recipe.validation_prompts and (done % recipe.validate_every == 0 or done == recipe.steps):
            with _averaged(average, parameters):
                run.image(validation_grid(teacher, student, recipe), "validation", done)

        # Save now and then, and when told to stop.
        if stopping.is_set:
            accelerator.set_trigger()
        stop = accelerator.check_trigger()
        failed = bad_steps >= recipe.max_bad_steps
        if is_main and (done % recipe.checkpoint_every == 0 or stop or failed):
            state = {"bad_steps": bad_steps, "config": recipe.model_dump(mode="json")}
            checkpoint.save(work, done, student, optimizer, average, state, recipe.keep_checkpoints)
        if failed:
            worst = next((term for term, value in terms.items() if not torch.isfinite(value)), "gradient")
            raise KoalaError(
                f"distillation stopped at step {done}: {bad_steps} steps in a row with a non-finite gradient ({worst}); "
                f"the state is saved in {work}; lower distill.learning_rate, or use bf16 in {recipe.launch}"
            )
        if stop:
            if is_main:
                say(f"distill: stopped at step {done}, saved; the same command goes on from there")
            raise SystemExit(128 + signal.SIGTERM)

    if is_main:
        with _averaged(average, parameters):
            student.save_pretrained(work / "unet.partial", safe_serialization=True)
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
    if recipe.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    teacher.unet.to(getattr(torch, recipe.teacher_dtype))
    scheduler = DDPMScheduler.from_config(teacher.scheduler.config)
    pairs = feature_pairs(recipe.features, stages)
    return DistillTask(student, teacher.unet, TextConditioner(teacher), scheduler, pairs, recipe)


def learning_rate(recipe: DistillConfig, step: int) -> float:
    """The rate of step `step` (from 0): a linear warm-up, then constant or a cosine to zero."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    share = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def validation_grid(
    teacher: StableDiffusionXLPipeline, student: UNet2DConditionModel, recipe: DistillConfig
) -> Image.Image:
    """Pictures of the validation prompts, teacher beside student, same seeds."""
    prompts = [(prompt, recipe.seed + number) for number, prompt in enumerate(recipe.validation_prompts)]
    columns = {}
    for label, unet in (("teacher", teacher.unet), ("student", student)):
        drawing = StableDiffusionXLPipeline(**{**teacher.components, "unet": unet}, add_watermarker=False)
        drawing.set_progress_bar_config(disable=True)
        columns[label] = pipeline.draw(drawing, prompts, recipe.validation_steps, recipe.validation_guidance)
    return grid(recipe.validation_prompts, columns)


@contextlib.contextmanager
def _averaged(average: EMAModel | None, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Put the moving average in the student's place for a while."""
    if average is None:
        yield
        return
    average.store(parameters)
    average.copy_to(parameters)
    yield
    average.restore(parameters)


class _Flag:
    is_set = False


def _stop_on_signal() -> _Flag:
    flag = _Flag()

    def stop(_signal: int, _frame: object) -> None:
        flag.is_set = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    return flag


def main(name: str) -> None:
    """One training process: rank 0 tells of it."""
    params = configuration.load()
    first = os.environ.get("RANK", "0") == "0"
    run_id = os.environ.get(RUN_ID)
    try:
        train(params, name, Path(os.environ[WORK]), StageRun(run_id) if first and run_id else None)
    except KoalaError as error:
        # The launcher turns every status into 1: the stage reads the line here.
        if first:
            Path(os.environ[WORK], COMPLAINT).write_text(str(error))
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1])
