"""The pictures that training shows of itself."""

import torch
from diffusers import StableDiffusionXLPipeline

from koala.config import load
from koala.distill.memory import LiveBytes
from koala.distill.validation import validation_grid


def test_more_prompts_take_no_more_memory(distillable, change_params) -> None:
    """Validation runs beside all that training holds: what fits once fits always."""
    params = load()
    teacher = StableDiffusionXLPipeline.from_pretrained(params.out("teacher"), use_safetensors=True)
    peaks, sizes = [], []
    for count in (1, 4):
        prompts = tuple(f"a large red circle, number {number}" for number in range(count))
        recipe = params.distill.model_copy(update={"validation_prompts": prompts, "validation_steps": 2})
        with torch.no_grad(), LiveBytes() as live:
            sizes.append(validation_grid(teacher, teacher.unet, recipe).size)
        peaks.append(live.peak)
    assert peaks[1] < 1.2 * peaks[0]
    assert sizes[0][0] == sizes[1][0] and sizes[0][1] < sizes[1][1]
