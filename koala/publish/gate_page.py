"""The gate's page: each rule with its verdict, and figures and images of teacher, champion and student, in one HTML file."""

import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala import page
from koala.publish.champion import Champion
from koala.publish.gate import Verdict

if TYPE_CHECKING:
    from PIL.Image import Image

FILE = "gate.html"
_STYLE = ".failed { color: #b00020; font-weight: 600; } td { white-space: normal; }"


def write(
    file: Path,
    student: str,
    verdicts: Sequence[Verdict],
    evaluation: Path,
    standing: Champion | None,
    images: "Image | None",
) -> None:
    """Write the page.

    Args:
        file: Where it goes.
        student: The student's name.
        verdicts: The gate's.
        evaluation: The student's evaluation.
        standing: The champion, where there is one that a rule asks for.
        images: Their images side by side (Champion.beside), where there are any.
    """
    metrics = json.loads((evaluation / "metrics.json").read_text())
    theirs = json.loads(standing.shelf.read(standing.version, "metrics.json") or b"{}") if standing else {}
    columns = {"teacher": metrics.get("teacher", {})}
    if standing:
        columns[standing.place] = theirs.get("after", {})
    columns[student] = metrics["after"]
    passed = all(verdict.passed for verdict in verdicts)
    outcome = "meets every rule" if passed else '<span class="failed">does not meet every rule</span>'
    parts = [
        f"<h1>{escape(student)} at the gate</h1>",
        f"<p>{escape(student)} {outcome} of publish.require.</p>",
        page.table(
            ("rule", "judged", "verdict"),
            [
                (str(each.rule), str(each).removeprefix(f"{each.rule}: "), "passed" if each.passed else "failed")
                for each in verdicts
            ],
        ),
        "<h2>Figures</h2>",
        page.table(("", *columns), _figures(columns, metrics["after"])),
    ]
    if images:
        content = io.BytesIO()
        images.save(content, "PNG")
        parts += ["<h2>The same prompts and seeds</h2>", page.embedded(content.getvalue(), "images of all models")]
    file.write_text(page.page(f"{student} at the gate", parts, _STYLE), encoding="utf-8")


def _figures(columns: Mapping[str, Mapping[str, Any]], ours: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each figure of the student's."""
    return [
        (name, *(_number(values.get(name)) for values in columns.values()))
        for name, value in ours.items()
        if isinstance(value, int | float)
    ]


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"
