"""The curves of a distillation: a table for DVC's plots and a picture for people."""

import json
from pathlib import Path
from typing import Any

HISTORY = "history.jsonl"


def read(work: Path) -> list[dict[str, Any]]:
    """The logged rows, in the order of their steps."""
    file = work / HISTORY
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def truncate(work: Path, done: int) -> None:
    """Drop what lies beyond step `done`, from which training goes on."""
    rows = [row for row in read(work) if row["step"] <= done]
    (work / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in rows))


def append(work: Path, step: int, values: dict[str, float]) -> None:
    """Add a row."""
    with (work / HISTORY).open("a") as stream:
        stream.write(json.dumps({"step": step, **values}) + "\n")


def write_curves(work: Path, folder: Path) -> None:
    """`curves.csv` (a row a logged step, a column a value) and `curves.png` (each loss term by itself) in `folder`."""
    import matplotlib.pyplot as plt
    import pandas as pd

    table = pd.DataFrame(read(work))
    table.to_csv(folder / "curves.csv", index=False)
    terms = [name for name in table if name.startswith("loss/")]
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for term in terms:
        axes.plot(table["step"], table[term], label=term.removeprefix("loss/"), linewidth=2 if "total" in term else 1)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="Distillation: terms of the objective")
    axes.grid(alpha=0.3)
    axes.legend(ncols=3, fontsize=8)
    figure.savefig(folder / "curves.png", dpi=120)
    plt.close(figure)
