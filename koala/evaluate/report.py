"""What a person reads of an evaluation: the table (text and markdown), the grid of pictures, a plot of attributes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from koala.evaluate.prompts import Prompt
from koala.grid import grid

LABELS = {"teacher": "teacher", "before": "student before distillation", "after": "student after"}
COLUMNS = ("model", "U-Net parameters", "size", "ms a step", "speed")
_QUALITY = {
    "attributes/all": ("attributes right", "{:.1%}"),
    "clip_score": ("CLIP score", "{:.2f}"),
    "agreement_db": ("PSNR to teacher", "{:.1f} dB"),
}


def write(
    folder: Path,
    student: str,
    measured: Mapping[str, Mapping[str, float]],
    pictures: Mapping[str, Sequence[Image.Image]],
    prompts: Sequence[Prompt],
    rows: int,
) -> None:
    """Write summary.{txt,md}, grid.png, and attributes.{csv,png} where attributes were measured, to `folder`."""
    columns, cells = table(student, measured)
    (folder / "summary.md").write_text(_markdown(columns, cells))
    (folder / "summary.txt").write_text(_text(columns, cells))
    # Rows at steps of the golden section: a few of them show most of what prompts that come in turn ask for.
    chosen = sorted({int(row * 0.618034 % 1 * len(prompts)) for row in range(rows)})
    columns_of_grid = {LABELS[name]: [images[number] for number in chosen] for name, images in pictures.items()}
    grid([prompts[number].text for number in chosen], columns_of_grid).save(folder / "grid.png")
    if "attributes/all" in measured["teacher"]:
        _attributes(folder, student, measured)


def table(student: str, measured: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Column names and formatted cells: a row each for the teacher, the student before, and after."""
    teacher = measured["teacher"]
    quality = [name for name in _QUALITY if any(name in values for values in measured.values())]
    columns = [*COLUMNS, *(_QUALITY[name][0] for name in quality)]
    rows = []
    for name, values in measured.items():
        rows.append(
            [
                LABELS[name].replace("student", student),
                f"{values['unet_parameters']:,.0f}",
                f"{values['unet_parameters'] / teacher['unet_parameters']:.0%}",
                f"{values['step_ms']:.1f}",
                f"{teacher['step_ms'] / values['step_ms']:.2f} x",
                *(_QUALITY[metric][1].format(values[metric]) if metric in values else "-" for metric in quality),
            ]
        )
    return columns, rows


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


def _attributes(folder: Path, student: str, measured: Mapping[str, Mapping[str, float]]) -> None:
    import matplotlib.pyplot as plt
    import pandas as pd

    names = ("size", "colour", "shape", "background", "all")
    table = pd.DataFrame(
        [
            {"model": LABELS[model], "attribute": name, "right": values[f"attributes/{name}"]}
            for model, values in measured.items()
            for name in names
        ]
    )
    table.to_csv(folder / "attributes.csv", index=False)
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    table.pivot(index="attribute", columns="model", values="right").loc[
        list(names), [LABELS[name] for name in measured]
    ].plot.bar(ax=axes, rot=0, width=0.8)
    axes.set(
        xlabel="",
        ylabel="share of pictures that are right",
        ylim=(0, 1.02),
        title=f"{student}: attributes asked for and seen",
    )
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(folder / "attributes.png", dpi=120)
    plt.close(figure)
