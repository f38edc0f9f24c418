"""The stage `evaluate`: a distilled student beside its teacher and beside itself before distillation.

One model is in memory at a time: the pipelines that generate, then the U-Nets that are timed, then what the metrics load.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.console import progress, say
from koala.errors import KoalaError
from koala.evaluate import extractors, page, report
from koala.evaluate.config import EvaluateConfig
from koala.evaluate.cost import costs
from koala.evaluate.generation import generate_images
from koala.evaluate.images import OVERVIEW, overview, read_images
from koala.evaluate.metrics.base import SetFigure
from koala.evaluate.prompts import Prompt, seeded_prompts
from koala.evaluate.statistics import CONFIDENCE, RESAMPLES, Estimate, by_category, estimate, from_draws
from koala.evaluate.values import FILE as VALUES
from koala.evaluate.values import Values
from koala.run import STATE, Run

if TYPE_CHECKING:
    from PIL.Image import Image

_NO_CURVES = "step,loss/total\n"


def evaluate(
    config: EvaluateConfig, teacher: Path, student: Path, distilled: Path, reference: Path, out: Path, run: Run
) -> None:
    """Measure `distilled` beside `teacher` and beside `student`, its weights before distillation.

    `out` holds report.html, metrics.json, values.parquet, summary.md, summary.txt, plots/ (PNG), samples/ (the student's
    images of the grid) and curves/curves.csv. metrics.json gives each model's values, those of `distilled` beside its
    teacher's, the 95 % `intervals` and one-sided 95 % `bounds` of scores, scores in `categories` of prompts, and what the
    figures depend on (`pinned`).

    The students' images are kept in `out / STATE`: an interrupted call resumes, and metrics can be added without
    generating again. Another student needs another `out`.

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
            differ in shape, a metric's model is not there, or a metric gives no number for an image.
    """
    for metric in config.metrics:
        metric.find()
    prompts = seeded_prompts(config.prompts, config.count, config.seed)
    images: dict[str, Sequence[Image]] = {"teacher": read_images(reference, prompts, config)}
    if _unet_config(student) != _unet_config(distilled):
        raise KoalaError(
            f"the U-Nets of {student} and {distilled} differ: give one student before and after distillation"
        )
    for model, folder in {"before": student, "after": distilled}.items():
        images[model] = generate_images(folder, prompts, config, out / STATE / model, f"evaluate: {model}")

    of_teacher, own = costs(teacher, distilled, config)
    cost = {"teacher": of_teacher, "before": own, "after": own}  # distillation changes weights only
    values, of_sets = _scores(images, prompts, config)
    shared = [name for name, column in config.columns().items() if column.of_teacher and name in values["teacher"]]
    texts = [prompt.text for prompt in prompts]
    scores, compared = estimate(texts, values, shared)
    for model in images:
        scores[model] |= {
            name: from_draws(figure.value, figure.draws, len(set(texts)))
            for name, figure in of_sets[model].items()
            if figure.draws is not None
        }
    measured = {
        model: {name: score.value for name, score in scores[model].items()}
        | {name: figure.value for name, figure in of_sets[model].items()}
        | cost[model]
        for model in images
    }
    derived = {
        "size_of_teacher": own["unet_parameters"] / of_teacher["unet_parameters"],
        "speed_up": of_teacher["step_ms"] / own["step_ms"],
        "image_speed_up": of_teacher["image_ms"] / own["image_ms"],
        **{name: figure.value for name, figure in compared.items()},
    }
    bounds = {name: figure.bounds for name, figure in {**scores["after"], **compared}.items()}

    categories = by_category(texts, [prompt.category for prompt in prompts], values, shared)
    pinned = _pinned(config, distilled, images["after"], prompts)
    sections = {
        "intervals": {**{model: _intervals(scores[model]) for model in scores}, **_intervals(compared)},
        "bounds": bounds,
        # A list, which `dvc metrics show` leaves out: its columns would bury the figures of all images.
        "categories": [asdict(each) for each in categories],
        "pinned": pinned,
    }
    _write(out, distilled, {**measured, **derived, **sections})
    Values(prompts, values).write(out / VALUES)
    table = report.write(out, distilled.name, measured, scores, compared, images, prompts, config)
    ranked_by = next(iter(shared), None)
    page.write(
        out / "report.html",
        distilled.name,
        table,
        values,
        cost,
        categories,
        ranked_by,
        images,
        prompts,
        out / "plots",
        pinned,
    )
    run.image(overview(images["after"]), OVERVIEW, 0)
    _log(run, out, measured, derived, {f"lower_bound/{name}": lower for name, (lower, _) in bounds.items()})
    say((out / "summary.txt").read_text())


def _scores(
    images: "Mapping[str, Sequence[Image]]", prompts: Sequence[Prompt], config: EvaluateConfig
) -> tuple[dict[str, dict[str, Sequence[float]]], dict[str, dict[str, SetFigure]]]:
    """Return each model's values of its images by the score's name, and its figures of all images together.

    A metric measures all models before the next one, so that what it loads is loaded once, and once for metrics in a row that
    load the same.
    """
    values: dict[str, dict[str, Sequence[float]]] = {model: {} for model in images}
    of_sets: dict[str, dict[str, SetFigure]] = {model: {} for model in images}
    for metric in config.metrics:
        for model in progress(images, f"evaluate: {metric.kind}", len(images)):
            reference = None if model == "teacher" else images["teacher"]
            for name, found in metric.measure(images[model], prompts, reference).items():
                _check(metric.kind, name, model, found, len(prompts))
                values[model][name] = found
            for name, figure in metric.measure_set(images[model], prompts, reference).items():
                _check(metric.kind, name, model, [figure.value], 1)
                of_sets[model][name] = figure
    extractors.forget()
    return values, of_sets


def _check(metric: str, name: str, model: str, values: Sequence[float], count: int) -> None:
    """Raise KoalaError where there is not a finite number for each image."""
    wrong = [number for number, value in enumerate(values) if value is None or not math.isfinite(value)]
    if wrong or len(values) != count:
        which = f"image {wrong[0]}" if wrong else f"each image: {len(values)} values of {count}"
        raise KoalaError(f"the metric {metric} gives no number {name} for {which} ({model}): mend the metric")


def _unet_config(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / "unet" / "config.json").read_text())
    return {name: value for name, value in values.items() if not name.startswith("_")}


def _intervals(figures: Mapping[str, Estimate]) -> dict[str, tuple[float, float]]:
    """Return intervals as pairs, which `dvc metrics show` leaves out: a column of it for each end would bury the figures."""
    return {name: figure.interval for name, figure in figures.items()}


def _pinned(
    config: EvaluateConfig, distilled: Path, images: "Sequence[Image]", prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Return what must be equal for figures of two evaluations to be compared."""
    width, height = images[0].size
    return {
        "sampler": json.loads((distilled / "scheduler" / "scheduler_config.json").read_text())["_class_name"],
        "steps": config.sampling.steps,
        "guidance": config.sampling.guidance,
        "size": f"{width}x{height}",
        "count": len(prompts),
        "prompts": len({prompt.text for prompt in prompts}),
        "seed": config.seed,
        "dtype": config.dtype,
        "metrics": {metric.kind: metric.model_dump(mode="json", exclude={"kind"}) for metric in config.metrics},
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
    }


def _write(out: Path, distilled: Path, metrics: Mapping[str, Any]) -> None:
    """Write metrics.json and the student's curves; plots and curves of an earlier call are removed."""
    plots, curves = out / "plots", out / "curves"
    for folder in (plots, curves):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    if (distilled / "curves.png").is_file():
        shutil.copyfile(distilled / "curves.png", plots / "curves.png")
    if (distilled / "curves.csv").is_file():
        shutil.copyfile(distilled / "curves.csv", curves / "curves.csv")
    else:
        (curves / "curves.csv").write_text(_NO_CURVES)


def _log(
    run: Run,
    out: Path,
    measured: Mapping[str, Mapping[str, float]],
    derived: Mapping[str, float],
    bounds: Mapping[str, float],
) -> None:
    """Log the student's values under their bare names, so that runs of two students compare by the same ones."""
    from PIL import Image

    others = {f"{model}.{name}": value for model in ("teacher", "before") for name, value in measured[model].items()}
    run.metrics({**measured["after"], **derived, **bounds, **others})
    for name in ("report.html", "metrics.json", "summary.md", "summary.txt"):
        run.artifact(out / name)
    for name in ("plots", "curves"):
        run.artifact(out / name, name)
    with Image.open(out / "plots" / "grid.png") as grid:
        run.image(grid, "grid", 0)
