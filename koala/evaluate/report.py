"""The report of an evaluation: the table (text and markdown), the grid of images, and the metrics' plots."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from koala.console import text_table
from koala.evaluate.config import SHARE, EvaluateConfig
from koala.evaluate.images import image_file
from koala.evaluate.prompts import Prompt
from koala.evaluate.statistics import Estimate
from koala.evaluate.values import SAMPLES, SAMPLES_OF_TEACHER

if TYPE_CHECKING:
    from PIL.Image import Image

Measured = Mapping[str, Mapping[str, float]]
"""Model -> value's name -> value. Models: teacher, before, after."""

Estimates = Mapping[str, Mapping[str, Estimate]]
"""Model -> score's name -> its mean over the images."""

LABELS = {"teacher": "teacher", "before": "student before distillation", "after": "student after"}
_UNIT = re.compile(r"\D+$")
_COST = ("model", "U-Net parameters", "size", "ms a step", "speed")


def write(
    out: Path,
    student: str,
    measured: Measured,
    scores: Estimates,
    compared: Mapping[str, Estimate],
    images: "Mapping[str, Sequence[Image]]",
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
) -> tuple[list[str], list[list[str]]]:
    """Write summary.txt, summary.md, plots/grid.png, the metrics' plots and samples/ to `out`. Return the table (see `table`).

    Args:
        out: The folder of the evaluation.
        student: The student's name.
        measured: The values of each model.
        scores: Those of its images, with their intervals.
        compared: The student's scores beside its teacher's.
        images: Each model's images, by the keys of `measured`.
        prompts: What the images were generated from.
        config: The metrics, and the rows of the grid.
    """
    from koala.plots import grid

    columns, cells = table(student, measured, scores, compared, config)
    (out / "summary.md").write_text(_markdown(columns, cells))
    (out / "summary.txt").write_text(text_table(columns, cells))
    plots = out / "plots"
    plots.mkdir(exist_ok=True)
    # Sample rows at golden-ratio steps, so that a few rows cover most of the cycled prompts.
    chosen = sorted({int(row * 0.618034 % 1 * len(prompts)) for row in range(config.grid_rows)})
    columns_of_grid = {LABELS[model]: [series[number] for number in chosen] for model, series in images.items()}
    grid([prompts[number].text for number in chosen], columns_of_grid).save(plots / "grid.png")
    shutil.rmtree(out / SAMPLES, ignore_errors=True)
    (out / SAMPLES_OF_TEACHER).mkdir(parents=True)
    for number in chosen:
        images["after"][number].save(image_file(out / SAMPLES, number))
        images["teacher"][number].save(image_file(out / SAMPLES_OF_TEACHER, number))
    labelled = {label(model, student): values for model, values in measured.items()}
    for metric in config.metrics:
        for name, figure in metric.plots(labelled).items():
            figure.savefig(plots / f"{name}.png", dpi=120)
    return columns, cells


def table(
    student: str, measured: Measured, scores: Estimates, compared: Mapping[str, Estimate], config: EvaluateConfig
) -> tuple[list[str], list[list[str]]]:
    """Return column names and formatted cells: a row each for the teacher, the student before, and after.

    A score stands with its 95 % interval: `97.8% (95.9-99.0)`. One of which more is better is followed by the student's share
    of its teacher's.
    """
    teacher = measured["teacher"]
    columns = [*_COST]
    quality: list[tuple[str, str]] = []  # name and format
    for name, column in config.columns().items():
        columns.append(column.label)
        quality.append((name, column.format))
        if f"{SHARE}/{name}" in compared:
            columns.append("of teacher's")
            quality.append((f"{SHARE}/{name}", "{:.1%}"))
    figures = {**scores, "after": {**scores["after"], **compared}}
    rows = [
        [
            label(model, student),
            f"{values['unet_parameters']:,.0f}",
            f"{values['unet_parameters'] / teacher['unet_parameters']:.0%}",
            f"{values['step_ms']:.1f}",
            f"{teacher['step_ms'] / values['step_ms']:.2f} x",
            *(_shown(figures[model].get(name), values.get(name), form) for name, form in quality),
        ]
        for model, values in measured.items()
    ]
    return columns, rows


def _shown(figure: Estimate | None, value: float | None, form: str) -> str:
    """Return a score with its interval, a figure of a set without one, or a dash."""
    if figure is None:
        return "-" if value is None else form.format(value)
    low, high = (_UNIT.sub("", form.format(end)) for end in figure.interval)
    return f"{form.format(figure.value)} ({low}-{high})"


def label(model: str, student: str) -> str:
    """Return what a report calls a model of `LABELS`: the student by its name."""
    return LABELS[model].replace("student", student)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
