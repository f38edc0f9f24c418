"""One measurement for `koala bench data`, in a separate process (koala.bench.runner)."""

import json
import sys
import time
from pathlib import Path

import polars as pl

from koala.bench.runner import Figures
from koala.console import show
from koala.data.source import source
from koala.data.table_config import Bounds
from koala.data.tables import TableSource
from koala.run import NoRun


def measure(file: str, out: str) -> Figures:
    """Return the seconds, CPU seconds and peak of memory of one table made of `file`."""
    config = TableSource(
        kind="file",
        location=file,
        score_columns=("aesthetic",),
        carry=("id",),
        where={"width": Bounds(at_least=512)},
    )
    folder = Path(out, "table")
    folder.mkdir(exist_ok=True)
    pl.thread_pool_size()  # loading the library is no part of the figures
    begin, cpu = time.perf_counter(), time.process_time()
    source(config, out=folder, run=NoRun())
    return {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": peak(),
    }


def peak() -> int:
    """Return the most bytes that this process held; what getrusage says begins with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


if __name__ == "__main__":
    show(json.dumps(measure(**json.loads(sys.argv[1]))))  # without torch, whose memory is no matter of the stage
