"""The report as one HTML file: figures, images and curves in it, nothing fetched, no script.

Prompts come from files and are shown as text only.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.evaluate.prompts import Prompt
from koala.evaluate.report import label
from koala.evaluate.statistics import OfCategory
from koala.page import embedded, page, table, thumbnail

if TYPE_CHECKING:
    from PIL.Image import Image

_EXTREMES = 5  # prompts at either end
_COSTED = ("teacher", "after")
_COSTS = {  # words, unit and digits
    "unet_parameters": ("U-Net parameters", 1, 0),
    "unet_flops": ("GFLOPs of a step of one image", 1e9, 2),
    "step_ms": ("ms of a step", 1, 1),
    "image_ms": ("ms of an image, with text encoders and VAE", 1, 0),
    "peak_bytes": ("GiB of memory at most", 2**30, 2),
    "disk_bytes": ("MB of weights on disk", 1e6, 1),
}
_STYLE = """
.images th, .images td { text-align: left; vertical-align: top; }
.images img { width: 160px; max-width: none; } .images .prompt { width: 20rem; white-space: normal; }
"""


def write(
    file: Path,
    student: str,
    summary: tuple[Sequence[str], Sequence[Sequence[str]]],
    values: Mapping[str, Mapping[str, Sequence[float]]],
    cost: Mapping[str, Mapping[str, float]],
    categories: Sequence[OfCategory],
    ranked_by: str | None,
    images: "Mapping[str, Sequence[Image]]",
    prompts: Sequence[Prompt],
    plots: Path,
    pinned: Mapping[str, Any],
) -> None:
    """Write the report.

    Args:
        file: Where it goes.
        student: The student's name.
        summary: Column names and cells of its table.
        values: Model -> score -> value of each image.
        cost: Model -> what it costs (koala.evaluate.cost).
        categories: Scores in each category of prompts.
        ranked_by: The score by which prompts are the best and the worst; None for none.
        images: Each model's images, by the keys of `values`.
        prompts: What the images were generated from.
        plots: The folder of the evaluation's plots (PNG): grid.png, curves.png, and those of metrics.
        pinned: What the figures depend on.
    """
    parts = [
        f"<h1>{escape(student)} beside its teacher</h1>",
        table(*summary),
        f'<p class="note">{len(prompts)} images of each model, the same prompts and seeds. '
        "In parentheses: 95 % intervals, by a paired bootstrap over prompts.</p>",
    ]
    parts += ["<h2>Cost</h2>", table(("", *(label(model, student) for model in _COSTED)), _costs(cost))]
    if categories:
        head = ("category", "score", "images", "teacher", student, "of teacher's")
        parts += ["<h2>By category of prompts, the worst first</h2>", table(head, list(map(_cells, categories)))]
    if ranked_by:
        ranked = _rank(prompts, values, ranked_by)  # the worst first
        below, above = [one for one in ranked if one[0] < 0], [one for one in reversed(ranked) if one[0] > 0]
        for title, chosen, word in (("Worst", below, "below"), ("Best", above, "above")):
            parts.append(f"<h2>{title} prompts, by {escape(ranked_by)} less the teacher's</h2>")
            parts.append(f'<p class="note">{len(chosen)} of {len(ranked)} prompts are {word} the teacher.</p>')
            if chosen:
                parts.append(_rows(student, chosen[:_EXTREMES], values, ranked_by, images, prompts))
    for title, name in (("The same prompts and seeds", "grid"), ("Distillation", "curves")):
        if (plots / f"{name}.png").is_file():
            parts += [f"<h2>{title}</h2>", embedded((plots / f"{name}.png").read_bytes(), title)]
    for plot in sorted(plots.glob("*.png")):
        if plot.stem not in ("grid", "curves"):
            parts += [f"<h2>{escape(plot.stem)}</h2>", embedded(plot.read_bytes(), plot.stem)]
    parts += ["<h2>What the figures depend on</h2>", table(("", ""), [(name, str(pinned[name])) for name in pinned])]
    file.write_text(page(student, parts, _STYLE), encoding="utf-8")


def _costs(cost: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    """Return a row for each cost that was measured."""
    return [
        (words, *(f"{cost[model][name] / unit:,.{digits}f}" for model in _COSTED))
        for name, (words, unit, digits) in _COSTS.items()
        if all(name in cost[model] for model in _COSTED)
    ]


def _cells(row: OfCategory) -> tuple[str, ...]:
    low, high = row.interval
    share = f"{row.share:.1%} ({100 * low:.1f}-{100 * high:.1f})"
    return row.category, row.score, str(row.images), f"{row.teacher:.4g}", f"{row.student:.4g}", share


def _rank(
    prompts: Sequence[Prompt], values: Mapping[str, Mapping[str, Sequence[float]]], score: str
) -> list[tuple[float, int]]:
    """Return, the worst first, each prompt's mean of the student's score less its teacher's, with its first image's index."""
    numbers: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        numbers.setdefault(prompt.text, []).append(number)
    ours, theirs = values["after"][score], values["teacher"][score]
    return sorted(
        (sum(ours[number] - theirs[number] for number in own) / len(own), _most_different(own, ours, theirs))
        for own in numbers.values()
    )


def _most_different(numbers: Sequence[int], ours: Sequence[float], theirs: Sequence[float]) -> int:
    return max(numbers, key=lambda number: abs(ours[number] - theirs[number]))


def _rows(
    student: str,
    chosen: Iterable[tuple[float, int]],
    values: Mapping[str, Mapping[str, Sequence[float]]],
    score: str,
    images: "Mapping[str, Sequence[Image]]",
    prompts: Sequence[Prompt],
) -> str:
    """Return a table of prompts with each model's image and its score."""
    head = "".join(
        f"<th>{escape(name)}</th>" for name in ("prompt", "difference", *(label(model, student) for model in images))
    )
    rows = []
    for difference, number in chosen:
        cells = [
            f'<td class="prompt">{escape(prompts[number].text)}<br><span class="note">seed {prompts[number].seed}</span>'
        ]
        cells.append(f"<td>{difference:+.3g}")
        for model, series in images.items():
            shown = f"<br>{values[model][score][number]:.3g}" if score in values[model] else ""
            cells.append(f"<td>{thumbnail(series[number], prompts[number].text)}{shown}")
        rows.append(f"<tr>{''.join(f'{cell}</td>' for cell in cells)}</tr>")
    return f'<table class="images"><tr>{head}</tr>{"".join(rows)}</table>'
