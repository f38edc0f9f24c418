"""One measurement for `koala bench stages`, in a separate process (koala.bench.runner)."""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from koala.bench.data_worker import peak
from koala.bench.runner import Figures
from koala.console import show
from koala.data.config import DownloadConfig, EncodeConfig, EncodeMachine, FilterConfig, NearDuplicates
from koala.data.rules.size import Size
from koala.data.rules.words import Words
from koala.data.shards import shards
from koala.run import STATE, NoRun

_FILTER = FilterConfig(rules=(Size(at_least=32), Words(at_least=3)), near_duplicates=NearDuplicates(), shard_size=5_000)


def measure(name: str, folder: str, port: int) -> Figures:
    """Return the seconds, CPU seconds and peak of memory of one pass over what `folder` holds.

    The CPU seconds are of all its processes, the memory is that of the largest.
    """
    work = _PASSES[name](Path(folder), port)
    begin, cpu = time.perf_counter(), _cpu()
    work()
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": _cpu() - cpu,
        "peak_bytes": max(peak(), children),
    }


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _download(folder: Path, port: int) -> Callable[[], Any]:
    from koala.data.download import download

    config = DownloadConfig(image_size=64, shard_size=5_000, allow=(f"127.0.0.1:{port}",))
    out = folder / "downloaded"
    out.mkdir()
    return lambda: download(config, folder / "table", out, NoRun())


def _judge(folder: Path, port: int) -> Callable[[], Any]:
    from koala.data.judge import judge_shards

    return lambda: judge_shards(shards(folder / "images"), _FILTER, folder / "judged")


def _decide(folder: Path, port: int) -> Callable[[], Any]:
    from koala.data.decide import decide

    state = folder / "kept" / STATE
    state.mkdir(parents=True, exist_ok=True)
    return lambda: decide(sorted((folder / "judged").glob("*.parquet")), _FILTER, state, folder / "kept")


def _write(folder: Path, port: int) -> Callable[[], Any]:
    from koala.data.filter import write_kept

    plan = _decide(folder, port)()  # it stands already
    return lambda: write_kept(folder / "images", plan, _FILTER, folder / "kept")


def _encode(folder: Path, port: int) -> Callable[[], Any]:
    import torch

    from koala.data.encode import encode_shards

    def costs_nothing(pixels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pixels), 4, pixels.shape[1] // 8, pixels.shape[2] // 8)

    config = EncodeConfig(buckets=((64, 64),), machine=EncodeMachine(batch_size=8))
    out = folder / "latents"
    out.mkdir()
    return lambda: sum(1 for _ in encode_shards(shards(folder / "images"), out, costs_nothing, config))


_PASSES = {"download": _download, "judge": _judge, "decide": _decide, "write": _write, "encode": _encode}


if __name__ == "__main__":
    show(json.dumps(measure(**json.loads(sys.argv[1]))))
