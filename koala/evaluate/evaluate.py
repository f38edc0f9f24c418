"""The stage `evaluate`: a distilled student beside its teacher and beside itself before distillation."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.console import say
from koala.errors import KoalaError
from koala.evaluate import report
from koala.evaluate.config import EvaluateConfig
from koala.evaluate.images import generate_images, read_images
from koala.evaluate.metrics.base import Metric
from koala.evaluate.prompts import Prompt, seeded_prompts
from koala.run import STATE, Run

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from PIL.Image import Image

_NO_CURVES = "step,loss/total\n"


def evaluate(
    config: EvaluateConfig, teacher: Path, student: Path, distilled: Path, reference: Path, out: Path, run: Run
) -> None:
    """Measure `distilled` beside `teacher` and beside `student`, its weights before distillation.

    `out` holds metrics.json, summary.md, summary.txt, plots/ (PNG) and curves/curves.csv. The students' images are kept
    in `out / STATE`: an interrupted call resumes, and metrics can be added without generating again. Another student
    needs another `out`.

    Args:
        config: What is measured, and how.
        teacher: The teacher's pipeline; only its U-Net is loaded.
        student: The student's pipeline before distillation.
        distilled: The student's pipeline after distillation; the student is called as this folder.
        reference: The teacher's images of the same prompts, from the stage `reference`.
        out: Where the evaluation goes.
        run: Receives values, plots and the grid.

    Raises:
        KoalaError: `reference` was made of other prompts, seeds or settings, or the U-Nets of `student` and `distilled`
            differ in shape.
    """
    prompts = seeded_prompts(config.prompts, config.count, config.seed)
    images: dict[str, Sequence[Image]] = {"teacher": read_images(reference, prompts, config)}
    if _unet_config(student) != _unet_config(distilled):
        raise KoalaError(
            f"the U-Nets of {student} and {distilled} differ: give one student before and after distillation"
        )
    for model, folder in {"before": student, "after": distilled}.items():
        images[model] = generate_images(folder, prompts, config, out / STATE / model, f"evaluate: {model}")

    measured = {model: _quality(model, images, prompts, config.metrics) for model in images}
    costs = _costs(teacher, distilled, config)
    measured["teacher"] |= costs["teacher"]
    for model in ("before", "after"):  # distillation changes weights only: both cost the same
        measured[model] |= costs["student"]
    derived = _compare(measured, config.metrics)

    _write(out, distilled, measured, derived, images, prompts, config)
    _log(run, out, measured, derived)
    say((out / "summary.txt").read_text())


def _quality(
    model: str, images: "Mapping[str, Sequence[Image]]", prompts: Sequence[Prompt], metrics: Sequence[Metric]
) -> dict[str, float]:
    reference = None if model == "teacher" else images["teacher"]
    values: dict[str, float] = {}
    for metric in metrics:
        values |= metric.measure(images[model], prompts, reference)
    return values


def _costs(teacher: Path, student: Path, config: EvaluateConfig) -> dict[str, dict[str, float]]:
    """Measure parameters and latency of two U-Nets side by side. Only they are in memory, not their pipelines."""
    from koala.evaluate.latency import step_latency

    unets = {name: _load_unet(folder, config.dtype) for name, folder in (("teacher", teacher), ("student", student))}
    tokens = json.loads((teacher / "text_encoder" / "config.json").read_text())["max_position_embeddings"]
    seconds = step_latency(unets, tokens, config.latency_batch, config.machine.latency_repeats)
    return {
        name: {
            "unet_parameters": sum(parameter.numel() for parameter in unet.parameters()),
            "step_ms": 1000 * seconds[name],
        }
        for name, unet in unets.items()
    }


def _load_unet(folder: Path, dtype: str) -> "UNet2DConditionModel":
    import torch
    from diffusers import UNet2DConditionModel

    from koala.generate import device

    unet = UNet2DConditionModel.from_pretrained(
        folder / "unet", torch_dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
    )
    return unet.eval().to(device())


def _unet_config(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / "unet" / "config.json").read_text())
    return {name: value for name, value in values.items() if not name.startswith("_")}


def _compare(measured: Mapping[str, Mapping[str, float]], metrics: Sequence[Metric]) -> dict[str, float]:
    """Compare the student after distillation with its teacher."""
    teacher, after = measured["teacher"], measured["after"]
    derived = {
        "size_of_teacher": after["unet_parameters"] / teacher["unet_parameters"],
        "speed_up": teacher["step_ms"] / after["step_ms"],
    }
    for name, column in report.columns_of(metrics).items():
        if column.of_teacher and name in teacher:
            derived[f"share_of_teacher/{name}"] = after[name] / teacher[name] if teacher[name] else 0.0
    return derived


def _write(
    out: Path,
    distilled: Path,
    measured: Mapping[str, Mapping[str, float]],
    derived: Mapping[str, float],
    images: "Mapping[str, Sequence[Image]]",
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
) -> None:
    """Write the evaluation's files; plots and curves of an earlier call are removed."""
    plots, curves = out / "plots", out / "curves"
    for folder in (plots, curves):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    (out / "metrics.json").write_text(json.dumps({**measured, **derived}, indent=2) + "\n")
    report.write(out, distilled.name, measured, config.metrics, images, prompts, config.grid_rows)
    if (distilled / "curves.png").is_file():
        shutil.copyfile(distilled / "curves.png", plots / "curves.png")
    if (distilled / "curves.csv").is_file():
        shutil.copyfile(distilled / "curves.csv", curves / "curves.csv")
    else:
        (curves / "curves.csv").write_text(_NO_CURVES)


def _log(run: Run, out: Path, measured: Mapping[str, Mapping[str, float]], derived: Mapping[str, float]) -> None:
    """Log the student's values under their bare names, so that runs of two students compare by the same ones."""
    from PIL import Image

    others = {f"{model}.{name}": value for model in ("teacher", "before") for name, value in measured[model].items()}
    run.metrics({**measured["after"], **derived, **others})
    for name in ("metrics.json", "summary.md", "summary.txt"):
        run.artifact(out / name)
    for name in ("plots", "curves"):
        run.artifact(out / name, name)
    with Image.open(out / "plots" / "grid.png") as grid:
        run.image(grid, "grid", 0)
