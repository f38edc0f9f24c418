"""The report of an evaluation: the table (text and markdown), the grid of images, and the metrics' plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from koala.evaluate.metrics.base import Column, Metric
from koala.evaluate.prompts import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

Measured = Mapping[str, Mapping[str, float]]
"""Model -> value's name -> value. Models: teacher, before, after."""

LABELS = {"teacher": "teacher", "before": "student before distillation", "after": "student after"}
_COST = ("model", "U-Net parameters", "size", "ms a step", "speed")


def write(
    out: Path,
    student: str,
    measured: Measured,
    metrics: Sequence[Metric],
    images: "Mapping[str, Sequence[Image]]",
    prompts: Sequence[Prompt],
    rows: int,
) -> None:
    """Write summary.txt, summary.md, plots/grid.png and the metrics' plots to `out`.

    Args:
        out: The folder of the evaluation.
        student: The student's name.
        measured: The values of each model.
        metrics: What measured them.
        images: Each model's images, by the keys of `measured`.
        prompts: What the images were generated from.
        rows: Prompts in the grid.
    """
    from koala.plots import grid

    columns, cells = table(student, measured, metrics)
    (out / "summary.md").write_text(_markdown(columns, cells))
    (out / "summary.txt").write_text(_text(columns, cells))
    plots = out / "plots"
    plots.mkdir(exist_ok=True)
    # Sample rows at golden-ratio steps, so that a few rows cover most of the cycled prompts.
    chosen = sorted({int(row * 0.618034 % 1 * len(prompts)) for row in range(rows)})
    columns_of_grid = {LABELS[model]: [series[number] for number in chosen] for model, series in images.items()}
    grid([prompts[number].text for number in chosen], columns_of_grid).save(plots / "grid.png")
    labelled = {_label(model, student): values for model, values in measured.items()}
    for metric in metrics:
        for name, figure in metric.plots(labelled).items():
            figure.savefig(plots / f"{name}.png", dpi=120)


def columns_of(metrics: Sequence[Metric]) -> dict[str, Column]:
    """Return the columns of all metrics by the name of their value."""
    return {name: column for metric in metrics for name, column in metric.columns.items()}


def table(student: str, measured: Measured, metrics: Sequence[Metric]) -> tuple[list[str], list[list[str]]]:
    """Return column names and formatted cells: a row each for the teacher, the student before, and after."""
    teacher = measured["teacher"]
    quality = columns_of(metrics)
    rows = [
        [
            _label(model, student),
            f"{values['unet_parameters']:,.0f}",
            f"{values['unet_parameters'] / teacher['unet_parameters']:.0%}",
            f"{values['step_ms']:.1f}",
            f"{teacher['step_ms'] / values['step_ms']:.2f} x",
            *(column.format.format(values[name]) if name in values else "-" for name, column in quality.items()),
        ]
        for model, values in measured.items()
    ]
    return [*_COST, *(column.label for column in quality.values())], rows


def _label(model: str, student: str) -> str:
    return LABELS[model].replace("student", student)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in [columns, *rows]) for column in range(len(columns))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [columns, ["-" * width for width in widths], *rows]
    ]
    return "\n".join(lines) + "\n"
