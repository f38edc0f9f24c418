"""Train a DistillTask by hand: student, frozen teacher and losses in one module, in your own loop.

    python examples/train_task.py my-sdxl latents --steps 100

`my-sdxl` is a pipeline folder, `latents` what encode_images.py or `koala encode` made.
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from koala.console import show
from koala.data.latents import LatentSet
from koala.distill import data
from koala.distill.config import DistillConfig
from koala.distill.losses import total
from koala.distill.text import TextConditioner
from koala.distill.train import assemble
from koala.unet.blocks import StudentRule, keep
from koala.unet.student import build_student

KOALA_700M = StudentRule(down_pairs=(0,), up_pairs=(0, 2), mid="drop", depth={"DW3": "5/10", "UP1": "5/10"})


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("latents", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = DistillConfig(steps=arguments.steps, batch_size=arguments.batch, learning_rate=1e-4)
    pipeline = StableDiffusionXLPipeline.from_pretrained(arguments.teacher, use_safetensors=True)
    student = build_student(pipeline.unet, KOALA_700M).float()
    stages = keep(pipeline.unet.config, KOALA_700M)
    task = assemble(student, pipeline.unet, TextConditioner(pipeline), pipeline.scheduler.config, stages, config).to(
        device
    )
    optimizer = torch.optim.AdamW(student.parameters(), config.learning_rate)
    latents = LatentSet(arguments.latents)
    batches = data.load(
        latents,
        latents.buckets,
        config,
        task.text.tokenize,
        1000,
        arguments.batch,
        rank=0,
        processes=1,
        start=0,
        device=device,
    )
    for step, micro_batches in enumerate(batches, start=1):
        for batch in micro_batches:
            terms = task(batch)
            total(terms, config.weights.model_dump()).backward()
        optimizer.step()
        optimizer.zero_grad()
        show(f"{step}: " + ", ".join(f"{name} {term.item():.4f}" for name, term in terms.items()))


if __name__ == "__main__":
    main()
