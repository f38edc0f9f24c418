"""One measurement for `koala bench data`, in a separate process (koala.bench.runner)."""

import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from koala.bench.images import SHARD, SIDE
from koala.bench.runner import Figures
from koala.console import show
from koala.data.config import DownloadConfig, EncodeConfig, EncodeMachine, FilterConfig, NearDuplicates
from koala.data.rules.size import Size
from koala.data.rules.words import Words
from koala.run import STATE, NoRun

_FILTER = FilterConfig(rules=(Size(at_least=32), Words(at_least=3)), near_duplicates=NearDuplicates(), shard_size=SHARD)


def measure(name: str, folder: str, port: int, format: str) -> Figures:
    """Return the seconds, CPU seconds and peak of memory of one pass over what `folder` holds.

    `port` is the images' server's, `format` that of the list which `source` reads. The CPU seconds are of all processes of
    the pass, the memory is that of the largest. Loading libraries is no part of the time.
    """
    passes: dict[str, Callable[[Path], Callable[[], Any]]] = {
        "source": partial(_source, format),
        "download": partial(_download, port),
        "judge": _judge,
        "decide": _decide,
        "write": _write,
        "encode": _encode,
    }
    work = passes[name](Path(folder))
    begin, cpu = time.perf_counter(), _cpu()
    work()
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": _cpu() - cpu,
        "peak_bytes": max(peak(), children),
    }


def peak() -> int:
    """Return the most bytes that this process held; what getrusage says begins with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _source(format: str, folder: Path) -> Callable[[], Any]:
    import polars as pl

    from koala.data.source import source
    from koala.data.table_config import Bounds
    from koala.data.tables import TableSource

    config = TableSource(
        kind="file",
        location=str(folder / f"list.{format}"),
        score_columns=("aesthetic",),
        carry=("id",),
        where={"width": Bounds(at_least=512)},
    )
    out = folder / f"table-{format}"
    out.mkdir()
    pl.thread_pool_size()  # loads the library
    return lambda: source(config, out=out, run=NoRun())


def _download(port: int, folder: Path) -> Callable[[], Any]:
    from koala.data.download import download

    config = DownloadConfig(image_size=SIDE, shard_size=SHARD, allow=(f"127.0.0.1:{port}",))
    out = folder / "downloaded"
    out.mkdir()
    return lambda: download(config, folder / "table", out, NoRun())


def _judge(folder: Path) -> Callable[[], Any]:
    from koala.data.judge import judge_shards
    from koala.data.shards import shards

    return lambda: judge_shards(shards(folder / "images"), _FILTER, folder / "judged")


def _decide(folder: Path) -> Callable[[], Any]:
    from koala.data.decide import decide

    state = folder / "kept" / STATE
    state.mkdir(parents=True, exist_ok=True)
    return lambda: decide(sorted((folder / "judged").glob("*.parquet")), _FILTER, state, folder / "kept")


def _write(folder: Path) -> Callable[[], Any]:
    from koala.data.filter import write_kept

    plan = _decide(folder)()  # it stands already
    return lambda: write_kept(folder / "images", plan, _FILTER, folder / "kept")


def _encode(folder: Path) -> Callable[[], Any]:
    import torch

    from koala.data.encode import encode_shards
    from koala.data.shards import shards

    def costs_nothing(pixels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pixels), 4, pixels.shape[1] // 8, pixels.shape[2] // 8)

    config = EncodeConfig(buckets=((SIDE, SIDE),), machine=EncodeMachine(batch_size=8))
    out = folder / "latents"
    out.mkdir()
    return lambda: sum(1 for _ in encode_shards(shards(folder / "images"), out, costs_nothing, config))


if __name__ == "__main__":
    show(json.dumps(measure(**json.loads(sys.argv[1]))))  # torch's memory is no matter of the passes without it
