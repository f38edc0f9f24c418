"""The model card, rendered from metrics and provenance, never written by hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from koala.publish.config import PublishConfig

_BODY = """
# {name}

A student of {base}, distilled with [KOALA](https://arxiv.org/abs/2312.04005)'s method: its U-Net holds
{size:.0%} of the teacher's parameters ({parameters:,.0f}) and takes {speed:.2f} times less for a step on the machine that
measured it. Licence of the weights: {license}.

{table}
![prompts down, models across, same seeds](grid.png)

## Use

```python
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained("PATH-OR-NAME", use_safetensors=True)
pipeline("{prompt}", num_inference_steps={steps}, guidance_scale={guidance}).images[0].save("picture.png")
```

## How it was made

Commit `{commit}`, MLflow run `{run_id}`, profile `{profile}`; parameters and the hashes of teacher, student and data are in
provenance.json, all metrics in metrics.json. {training_steps} steps of {batch_size} images at a learning rate of {rate:g}.
"""


def render(
    name: str,
    metrics: Mapping[str, Any],
    derived: Mapping[str, float],
    provenance: Mapping[str, Any],
    table: str,
    config: PublishConfig,
) -> str:
    """The card as text, with a `model-index` of what was measured in its header."""
    from huggingface_hub import EvalResult, ModelCardData

    after = metrics["after"]
    results = [
        EvalResult(
            task_type="text-to-image",
            dataset_type="koala-prompts",
            dataset_name=f"koala's prompts, profile {provenance['profile']}",
            metric_type=metric,
            metric_value=round(float(value), 4),
        )
        for metric, value in {**after, **derived}.items()
    ]
    header = ModelCardData(
        model_name=name,
        license=config.license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=config.base_model,
        tags=["koala", "distillation", "stable-diffusion-xl"],
        eval_results=results,
    )
    recipe = provenance["distill"]
    body = _BODY.format(
        name=name,
        base=config.base_model or "a tiny teacher of SDXL's classes that the project trains itself",
        size=derived["size_of_teacher"],
        parameters=after["unet_parameters"],
        speed=derived["speed_up"],
        license=config.license,
        table=table,
        prompt=config.example_prompt,
        steps=config.steps,
        guidance=config.guidance,
        training_steps=recipe["steps"],
        batch_size=recipe["batch_size"],
        rate=recipe["learning_rate"],
        **{key: provenance[key] for key in ("commit", "run_id", "profile")},
    )
    return f"---\n{header.to_yaml()}\n---\n{body}"


def write(folder: Path, text: str) -> None:
    """README.md, where the Hub looks for a card."""
    (folder / "README.md").write_text(text)
