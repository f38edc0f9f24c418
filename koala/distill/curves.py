"""The losses of a training run: a log that training appends to, a table for DVC's plots, and a plot for people."""

import json
import re
from pathlib import Path
from typing import Any

HISTORY = "history.jsonl"
IMAGE = "curves.png"
"""The plot, written last."""
SPEED = "images_per_second"
"""The one logged value that differs from run to run."""


def read(state: Path) -> list[dict[str, Any]]:
    """Return the logged rows, in the order of their steps."""
    file = state / HISTORY
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written


def truncate(state: Path, done: int) -> None:
    """Drop rows beyond step `done`, from which training resumes."""
    rows = [row for row in read(state) if row["step"] <= done]
    partial = state / f"{HISTORY}.partial"
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.rename(state / HISTORY)


def append(state: Path, step: int, values: dict[str, float]) -> None:
    """Append a row."""
    with (state / HISTORY).open("a") as stream:
        stream.write(json.dumps({"step": step, **values}) + "\n")


def write(state: Path, folder: Path) -> None:
    """Write `curves.csv` (a row a logged step, a column a value) and `curves.png` (each loss term) to `folder`."""
    import pandas as pd
    from matplotlib.figure import Figure

    table = pd.DataFrame(read(state))
    table.to_csv(folder / "curves.csv", index=False)
    panels = {"Distillation: terms of the objective": [name for name in table if name.startswith("loss/")]}
    if "held_out/total" in table:
        panels["On held-out samples"] = [name for name in table if re.fullmatch(r"held_out/(feature/)?\w+", name)]
        panels["On held-out samples, by timestep"] = [name for name in table if name.startswith("held_out/total/")]
    figure = Figure(figsize=(9, 1 + 4 * len(panels)), layout="constrained")
    for axes, (title, columns) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for name in columns:
            rows = table[["step", name]].dropna()
            term, marker = name.partition("/")[2], "o" if len(rows) == 1 else None
            axes.plot(rows["step"], rows[name], label=term, linewidth=2 if term == "total" else 1, marker=marker)
        axes.set(xlabel="step", ylabel="loss", yscale="log", title=title)
        axes.grid(alpha=0.3)
        axes.legend(ncols=3, fontsize=8)
    figure.savefig(folder / IMAGE, dpi=120)
