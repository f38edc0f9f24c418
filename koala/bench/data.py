"""`koala bench data`: how the stages before training grow with the length of a list, each pass in a separate process.

Lists are of web-like URLs with captions, two scores and an id; one URL in fifty comes twice, one row in a hundred is out of
bounds. Images are drawn, 64 px, all different. The download fetches them from a server on loopback; encode has a VAE that costs
nothing.
"""

import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from koala.bench import report, runner
from koala.bench.images import served, write_images, write_table
from koala.bench.lists import write_list
from koala.console import progress
from koala.errors import KoalaError

FORMATS = ("parquet", "csv", "jsonl")
PASSES = ("source", "download", "judge", "decide", "write", "encode")
"""In the order in which each finds what those before it made; `source` and the download make nothing that they read."""
ROWS = (10_000, 100_000)


def bench(
    rows: Sequence[int], passes: Sequence[str], formats: Sequence[str], rounds: int, out: Path | None, plot: Path | None
) -> None:
    """Measure the passes over each number of rows, and `source` for each format of its list; show rows/s and memory.

    The raw figures go to `out`, a plot to `plot`. Raises KoalaError for a pass or a format that is none.
    """
    for kind, chosen, known in (("pass", passes, PASSES), ("format", formats, FORMATS)):
        if unknown := [name for name in chosen if name not in known]:
            raise KoalaError(f"no {kind} {unknown[0]!r} to measure: choose from {', '.join(known)}")
    wanted = [name for name in PASSES if name in (passes or PASSES)]
    from koala.bench.device import processor

    where = {
        "device": f"{processor()}, {os.cpu_count()} threads",
        "python": platform.python_version(),
        "polars": version("polars"),
    }
    found = []
    for count in rows or ROWS:
        runs: dict[str, list[runner.Figures]] = {}
        for _ in range(rounds):
            with tempfile.TemporaryDirectory(prefix="koala-bench-") as folder:
                for name, figures in _measure(wanted, formats or FORMATS, count, Path(folder)):
                    runs.setdefault(name, []).append(figures)
        for name, measured in runs.items():
            seconds = [figures.get("seconds") for figures in measured]
            figures = runner.median(measured, "seconds")
            found.append({"name": name, "rows": count, **figures, "seconds_of_rounds": seconds, "where": where})
    report.data(report.document("data", {"rounds": rounds}, found), out, plot)


def _measure(
    passes: Sequence[str], formats: Sequence[str], count: int, folder: Path
) -> Iterator[tuple[str, runner.Figures]]:
    """Measure each pass once, over `count` rows that are made in `folder`."""
    if set(passes) - {"source", "download"}:
        write_images(folder / "images", count)
    with served() as port:
        write_table(folder / "table", count, port)
        turns = [(name, kind) for name in passes for kind in (formats if name == "source" else ("",))]
        for name, kind in progress(turns, f"bench data: {count:,} rows"):
            if kind:
                write_list(folder / f"list.{kind}", count)
            spec = {"name": name, "folder": str(folder), "port": port, "format": kind}
            yield f"{name}, {kind}" if kind else name, runner.run("data_worker", spec)
