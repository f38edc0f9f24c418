"""What a person sees of training: pictures of the validation prompts, teacher beside student."""

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from koala import pipeline
from koala.distill.config import DistillConfig
from koala.grid import grid


def validation_grid(
    teacher: StableDiffusionXLPipeline, student: UNet2DConditionModel, recipe: DistillConfig
) -> Image.Image:
    """Prompts down, teacher and student across, the same seeds. Models are used where they are; the VAE goes along.

    Picture by picture: at 1024 px the VAE's decoder takes 2.6 GiB for each, beside all that training holds.
    The teacher's parts may be in half precision and the student is in float32: autocast makes them meet.
    """
    prompts = [(prompt, recipe.seed + number) for number, prompt in enumerate(recipe.validation_prompts)]
    device, dtype = student.device, getattr(torch, recipe.teacher_dtype)
    columns = {}
    teacher.vae.to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for label, unet in (("teacher", teacher.unet), ("student", student)):
            drawing = StableDiffusionXLPipeline(**{**teacher.components, "unet": unet}, add_watermarker=False)
            drawing.set_progress_bar_config(disable=True)
            columns[label] = [
                image
                for prompt in prompts
                for image in pipeline.draw(drawing, [prompt], recipe.validation_steps, recipe.validation_guidance)
            ]
    teacher.vae.to("cpu")
    return grid(recipe.validation_prompts, columns)
