"""Validation images while training: the prompts down, teacher and student across, the same seeds."""

import hashlib
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from koala.distill.config import DistillConfig
from koala.distill.job import VALIDATION
from koala.generate import generate
from koala.plots import grid


def validate(
    step: int,
    teacher: StableDiffusionXLPipeline,
    student: UNet2DConditionModel,
    config: DistillConfig,
    state: Path,
    device: torch.device,
) -> None:
    """Write a grid of the teacher's and the student's images to `state`/validation/STEP.png.

    Both U-Nets compute in the teacher's dtype without autocast, and eagerly: what training compiled is for other batches, and
    would be compiled anew for a few images. The teacher's images never change: they are generated once and kept. The
    student and the VAE are on `device` only while this runs.
    """
    folder = state / VALIDATION
    folder.mkdir(exist_ok=True)
    prompts = [(prompt, config.seed + index) for index, prompt in enumerate(config.sampling.prompts)]
    key = hashlib.sha256(repr((prompts, config.sampling.steps, config.sampling.guidance)).encode()).hexdigest()[:8]
    kept = [folder / f"teacher-{key}-{index}.png" for index in range(len(prompts))]
    teacher.vae.to(device)
    try:
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
            for prompt, file in zip(prompts, kept, strict=True):
                if not file.is_file():
                    _save(_images(teacher, teacher.unet, [prompt], config)[0], file)
            images = _images(teacher, student.to(device), prompts, config)
    finally:
        teacher.vae.to("cpu")
        student.to("cpu")
    columns = {"teacher": [Image.open(file).convert("RGB") for file in kept], "student": images}
    _save(grid(config.sampling.prompts, columns), folder / f"{step:08d}.png")


def _images(
    teacher: StableDiffusionXLPipeline,
    unet: UNet2DConditionModel,
    prompts: list[tuple[str, int]],
    config: DistillConfig,
) -> list[Image.Image]:
    """Generate one image at a time: at 1024 px the VAE's decoder takes 2.6 GiB for each, beside all that training holds."""
    zeros = teacher.config.force_zeros_for_empty_prompt  # no component: the pipeline's own unconditional input
    pipeline = StableDiffusionXLPipeline(
        **{**teacher.components, "unet": unet}, force_zeros_for_empty_prompt=zeros, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return [image for prompt in prompts for image in generate(pipeline, [prompt], config.sampling)]


def _save(image: Image.Image, file: Path) -> None:
    """Write a PNG in one step: the stage may look at any moment."""
    partial = file.with_suffix(".partial")
    image.save(partial, "PNG")
    partial.rename(file)
