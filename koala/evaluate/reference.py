"""The stage `reference`: the teacher's images of the evaluation prompts, generated once for all students."""

from pathlib import Path

from koala.evaluate.config import EvaluateConfig
from koala.evaluate.generation import generate_images
from koala.evaluate.images import OVERVIEW, overview
from koala.evaluate.prompts import seeded_prompts
from koala.run import Run


def reference(config: EvaluateConfig, teacher: Path, out: Path, run: Run) -> None:
    """Generate the images of `teacher` into `out`; images already there are kept.

    `out` holds 000000.png, 000001.png, ..., prompts.jsonl (text and seed of each) and settings.json.
    """
    prompts = seeded_prompts(config.prompts, config.count, config.seed)
    images = generate_images(teacher, prompts, config, out, "reference")
    run.metrics({"images": len(images)})
    run.image(overview(images), OVERVIEW, 0)
