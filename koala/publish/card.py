"""The model card, rendered from metrics and provenance."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from koala.publish.config import PublishConfig

_BODY = """
# {name}

A student of {base}, distilled with [KOALA](https://arxiv.org/abs/2312.04005)'s method: its U-Net holds
{size:.0%} of the teacher's parameters ({parameters:,.0f}) and takes {speed:.2f} times less for a step on the machine that
measured it. Licence of the weights: {license} ([LICENSE.md](LICENSE.md)).

{table}
Scores stand with 95 % intervals, from a bootstrap over prompts.

![prompts down, models across, same seeds](grid.png)

{strengths}## Use it in diffusers

```python
import torch
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained(
    "PATH-OR-NAME", torch_dtype=torch.{dtype}, use_safetensors=True
).to("cuda")
pipeline({prompt}, num_inference_steps={steps}, guidance_scale={guidance:g}).images[0].save("image.png")
```

{files}## How it was made

{origin}
"""
_EXAMPLE = "a photograph of a red fox in the snow"


@dataclass(frozen=True)
class SingleFiles:
    """The single files of a release, by name, and the class as which ComfyUI recognises the student."""

    checkpoint: str | None
    unet: str | None
    workflow: str | None
    recognised: str | None
    zeros: bool = True
    """Whether the pipeline has zeros where the negative prompt is empty."""

    @property
    def remark(self) -> str:
        """Say what front ends make of the checkpoint."""
        if self.recognised:
            return f"ComfyUI recognises it as {self.recognised}"
        return "ComfyUI and its relatives do not recognise this shape: it loads in diffusers and koala only"


NO_FILES = SingleFiles(None, None, None, None)


def example(config: PublishConfig) -> str:
    """Return the prompt of the card's example."""
    return next(iter(config.sampling.prompts), _EXAMPLE)


def render(
    name: str,
    metrics: Mapping[str, Any],
    derived: Mapping[str, float],
    training: Mapping[str, Any],
    table: str,
    config: PublishConfig,
    files: SingleFiles = NO_FILES,
) -> str:
    """Return the card's text, with a `model-index` of what was measured in its header.

    Args:
        name: The student's name.
        metrics: Content of metrics.json.
        derived: Its values of the student against the teacher.
        training: Provenance of the training; empty where there is none.
        table: The report's table in markdown.
        config: Licence, base model and the example's sampling.
        files: The release's single files.
    """
    from huggingface_hub import EvalResult, ModelCardData

    after = metrics["after"]
    profile = training.get("profile")
    stated = metrics.get("intervals", {})
    intervals = {**stated.get("after", {}), **{name: ends for name, ends in stated.items() if name in derived}}
    results = [
        EvalResult(
            task_type="text-to-image",
            dataset_type="koala-prompts",
            dataset_name=f"koala's prompts, profile {profile}" if profile else "koala's prompts",
            metric_type=metric,
            metric_name=_named(metric, intervals.get(metric)),
            metric_value=round(float(value), 4),
        )
        for metric, value in {**after, **derived}.items()
    ]
    header = ModelCardData(
        model_name=name,
        license=config.license,
        license_name=config.license_name,
        license_link=config.license_link or ("LICENSE.md" if config.license_name else None),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=config.base_model,
        datasets=list(config.datasets) or None,
        tags=["koala", "distillation", "stable-diffusion-xl", *_tags(files)],
        eval_results=results,
    )
    body = _BODY.format(
        name=name,
        base=config.base_model or "a tiny teacher of SDXL's classes that the project trains itself",
        size=derived["size_of_teacher"],
        parameters=after["unet_parameters"],
        speed=derived["speed_up"],
        license=config.licence,
        table=table,
        dtype=config.dtype,
        strengths=_strengths(metrics.get("categories", ())),
        prompt=json.dumps(example(config), ensure_ascii=False),  # quotes and line breaks escaped
        steps=config.sampling.steps,
        guidance=config.sampling.guidance,
        files=_files(files, config.dtype),
        origin=_origin(name, training),
    )
    return f"---\n{header.to_yaml()}\n---\n{body}"


def license_text(name: str, config: PublishConfig) -> str:
    """Return the text of LICENSE.md for a teacher that comes without one."""
    teacher = config.base_model or "its teacher"
    link = config.license_link or f"https://huggingface.co/models?license=license:{config.license}"
    return (
        f"# Licence of {name}\n\nThe weights are derived from {teacher} and released under its licence, {config.licence}, "
        f"use restrictions included: {link}\n"
    )


def _named(metric: str, interval: Sequence[float] | None) -> str | None:
    """Return a metric's name with its interval, for which the Hub's model-index has no field; None where it has none."""
    return f"{metric}, 95 % interval {interval[0]:.4g} to {interval[1]:.4g}" if interval else None


def _tags(files: SingleFiles) -> list[str]:
    return ["diffusion-single-file"] * bool(files.checkpoint) + ["comfyui"] * bool(files.recognised)


def _strengths(categories: Sequence[Mapping[str, Any]]) -> str:
    """Return the card's section on what the student is good and bad at, by the first score; empty without categories."""
    rows = [row for row in categories if row["score"] == categories[0]["score"]]
    if not rows:
        return ""
    lines = [
        "## What it is good at",
        "",
        f"Its `{rows[0]['score']}` beside its teacher's by category of prompts, with 95 % intervals:",
        "",
        "| prompts | images | of teacher's |",
        "| --- | ---: | ---: |",
    ]
    for row in reversed(rows):
        low, high = row["interval"]
        lines.append(f"| {row['category']} | {row['images']} | {row['share']:.1%} ({100 * low:.1f}-{100 * high:.1f}) |")
    return "\n".join(lines) + "\n\n"


def _files(files: SingleFiles, dtype: str) -> str:
    """Return the card's sections on single files; empty where there are none."""
    if not files.checkpoint:
        return ""
    lines = [
        "## Single files\n",
        f"- `{files.checkpoint}`: the whole model in SDXL's original layout, {dtype}. {files.remark}. "
        "It holds its configurations and tokenizers: `koala generate` reads it offline.",
        f"- `{files.unet}`: the U-Net under diffusers' names, {dtype}, for loaders of diffusion models.",
    ]
    if files.workflow:
        zeros = "; zero the negative conditioning where the negative prompt is empty" if files.zeros else ""
        lines += [
            f"- `{files.workflow}`: a ComfyUI workflow (API format) with the example above.\n",
            "## Use it in ComfyUI\n",
            f"Put `{files.checkpoint}` into `models/checkpoints`, and open `{files.workflow}`. Or load it with the node *Load "
            f"Checkpoint* in any SDXL workflow{zeros}.",
        ]
    return "\n".join(lines) + "\n\n"


def _origin(name: str, training: Mapping[str, Any]) -> str:
    """Say what is known of the training, and how to repeat it."""
    names = {"commit": "commit", "run_id": "MLflow run", "profile": "profile"}
    known = ", ".join(f"{label} `{training[key]}`" for key, label in names.items() if training.get(key))
    sentences = [f"{known[0].upper()}{known[1:]}."] if known else []
    if training:
        sentences.append("Parameters and the hashes of what it was trained from are in training.json.")
    sentences.append("All metrics are in metrics.json, images in report.html.")
    recipe = training.get("config") or {}
    if {"steps", "batch_size", "learning_rate"} <= set(recipe):
        rate = recipe["learning_rate"]
        sentences.append(f"{recipe['steps']} steps of {recipe['batch_size']} images at a learning rate of {rate:g}.")
    if (commit := training.get("commit")) and (profile := training.get("profile")):
        dirty = " (its tree held changes that are not in the commit)" if str(commit).endswith("-dirty") else ""
        sentences += [
            f"\nTo make it again{dirty}, in a clone of the project, with `profile: {profile}` in params.yaml:\n",
            f"```sh\ngit checkout {str(commit).removesuffix('-dirty')}\ndvc repro publish@{name}\n```",
        ]
    return "\n".join(sentences)
