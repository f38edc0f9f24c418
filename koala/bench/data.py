"""`koala bench data`: how the stage `source` grows with its list, each measurement in a separate process.

Lists are of web-like URLs with captions, two scores and an id; one URL in fifty comes twice, one row in a hundred is out of
bounds.
"""

import os
import platform
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from koala.bench import report, runner
from koala.bench.lists import write_list
from koala.console import progress
from koala.errors import KoalaError

FORMATS = ("parquet", "csv", "jsonl")
ROWS = (10_000, 100_000, 1_000_000)


def bench(rows: Sequence[int], formats: Sequence[str], rounds: int, out: Path | None, plot: Path | None) -> None:
    """Measure `rows` of each format and show rows/s and memory; the raw figures go to `out`, a plot to `plot`.

    Raises KoalaError for a format that is none.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise KoalaError(f"no format {unknown[0]!r} to measure: choose from {', '.join(FORMATS)}")
    from koala.bench.device import processor

    where = {
        "device": f"{processor()}, {os.cpu_count()} threads",
        "python": platform.python_version(),
        "polars": version("polars"),
    }
    found = []
    turns = [(name, count) for name in formats or FORMATS for count in rows or ROWS]
    for name, count in progress(turns, "bench data"):
        with tempfile.TemporaryDirectory(prefix="koala-bench-") as folder:
            file = write_list(Path(folder, f"list.{name}"), count)
            runs = [runner.run("data_worker", {"file": str(file), "out": folder}) for _ in range(rounds)]
        figures = runner.median(runs, "seconds")
        seconds = [run.get("seconds") for run in runs]
        found.append({"name": name, "rows": count, **figures, "seconds_of_rounds": seconds, "where": where})
    report.data(report.document("data", {"rounds": rounds}, found), out, plot)
