"""The stage `score`: numbers and embeddings of each image, by models, for the filter.

A shard NAME.tar becomes NAME.parquet: `key`; `sha256` of the image's bytes; a float32 column for each score, null where there
is none; and, where embeddings are kept, `embedding`, a unit vector in float16. An image that cannot be decoded has no scores,
and zeros for its embedding. A shard is finished when its parquet file is in `out`: a killed run resumes after it. What was
computed of an image is remembered by its hash (koala.data.scores.known), so that it is computed once, wherever it stands.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from koala.console import progress, say
from koala.data import manifest
from koala.data.executor import share, use_gpu
from koala.data.scores.config import ScoreConfig
from koala.data.scores.known import Known
from koala.data.shards import read_shard, shards
from koala.errors import KoalaError
from koala.plots import histogram
from koala.run import STATE, Run

_BINS = 50


def score(config: ScoreConfig, images: Path, out: Path, run: Run) -> None:
    """Score every shard of `images`; shards already in `out` are left as they are. Without scores there is nothing to do.

    Raises KoalaError if there are no shards, a package is missing, or a model cannot be had.
    """
    stats: dict[str, Any] = {"samples": 0, "undecodable": 0, "scores": {}}
    if config.computes:
        for scorer in config.scorers:
            scorer.check()
        files = shards(images)
        if not files:
            raise KoalaError(f"{images} holds no shards (.tar): run `dvc repro download` again")
        manifest.check(images)
        manifest.resume(out, config, images)
        pending = [file for file in files if not (out / f"{file.stem}.parquet").is_file()]
        work, machine = partial(_score_shards, config, out), config.machine
        with share(work, pending, machine.processes, machine.engine) as finished:
            for _ in progress(finished, "score: shards", total=len(files), done=len(files) - len(pending)):
                pass
        stats = _summary([out / f"{file.stem}.parquet" for file in files], config, out)
    (out / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    run.metrics({name: stats[name] for name in ("samples", "undecodable")})
    for name, found in stats["scores"].items():
        run.metrics({f"{name}.{figure}": found[figure] for figure in ("count", "mean")})
        run.artifact(out / f"{name}.png")
    if stats["undecodable"]:
        say(f"score: {stats['undecodable']} of {stats['samples']} images cannot be decoded: their scores are null")
    manifest.write(out, *([images] if config.computes else []))
    shutil.rmtree(out / STATE, ignore_errors=True)


def _score_shards(config: ScoreConfig, out: Path, files: Sequence[Path], rank: int) -> Iterator[Path]:
    """Score shards with models of this process's own, on the GPU of its rank. Yield each that is finished."""
    from koala.data.scores.models import Models

    use_gpu(rank)
    folder = config.machine.cache or out / STATE
    with ThreadPoolExecutor(config.machine.threads) as threads, Known(folder / "known.sqlite") as known:
        models = Models(config, threads, known)
        for file in files:
            manifest.verify(file)
            unfinished = out / f"{file.stem}.part"
            pq.write_table(models.score(read_shard(file)), unfinished)
            os.replace(unfinished, out / f"{file.stem}.parquet")
            yield file


def _summary(files: Sequence[Path], config: ScoreConfig, out: Path) -> dict[str, Any]:
    """Return the counts, and of each score the mean and the range; plot its histogram. One shard is in memory at a time."""
    from koala.data.scores.models import UNDECODABLE

    written = [pq.read_metadata(file) for file in files]
    scores = {}
    for kind in (scorer.kind for scorer in config.scorers):
        figures = [_figures(values) for file in files if len(values := _values(file, kind))]
        count = sum(figure["count"] for figure in figures)
        low = min((figure["min"] for figure in figures), default=0.0)
        high = max((figure["max"] for figure in figures), default=0.0)
        total = sum(figure["count"] * figure["mean"] for figure in figures)
        scores[kind] = {"count": count, "mean": total / max(count, 1), "min": low, "max": high}

        edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
        counts = sum((np.histogram(_values(file, kind), edges)[0] for file in files), np.zeros(_BINS, int))
        plot = histogram(edges.tolist(), {"images": counts.tolist()}, (), f"{kind}, {count:,} images")
        plot.savefig(out / f"{kind}.png")
    return {
        "samples": sum(each.num_rows for each in written),
        "undecodable": sum(int(each.metadata[UNDECODABLE]) for each in written),
        "scores": scores,
    }


def _figures(values: np.ndarray) -> dict[str, Any]:
    return {
        "count": len(values),
        "mean": float(values.mean(dtype=np.float64)),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def _values(file: Path, column: str) -> np.ndarray:
    """Return the numbers of a column that are not null."""
    values: np.ndarray = pq.read_table(file, columns=[column])[column].drop_null().to_numpy()
    return values
