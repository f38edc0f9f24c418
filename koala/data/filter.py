"""The stage `filter`: keeps the samples worth training on, and reports why the others were dropped.

The first pass judges each sample by itself, shard by shard, and stores the result in `out/state/judged`: a killed run
resumes after the last judged shard. The second pass reads the samples in order, drops duplicates, and writes. It starts
over when interrupted.
"""

import hashlib
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from koala.console import progress, say
from koala.data import manifest
from koala.data.config import FilterConfig
from koala.data.dedup import Duplicates, dhash
from koala.data.filter_report import FILES, FilterReport
from koala.data.rules import broken_rule, look
from koala.data.shards import Sample, ShardWriter, read_shard, shards
from koala.errors import KoalaError
from koala.run import STATE, Run

DROPPED = pa.schema({name: pa.string() for name in ("key", "url", "caption", "rule")})
"""Columns of dropped.parquet."""
JUDGED = pa.schema({**{field.name: field.type for field in DROPPED}, "sha256": pa.binary(), "dhash": pa.uint64()})
"""Columns of the judged tables. `rule` is the rule that the sample breaks by itself, or null."""
NOT_KEPT_META = ("status", "error_message")


def filter(config: FilterConfig, images: Path, out: Path, run: Run) -> None:
    """Write the samples of `images` that are worth training on to shards in `out`.

    `out` also gets dropped.parquet (key, url, caption and rule of each dropped sample), report.json and plots.
    Raises KoalaError if nothing is kept.
    """
    inputs = shards(images)
    if not inputs:
        raise KoalaError(f"{images} holds no shards: run `dvc repro download` again")
    manifest.check(images)
    manifest.resume(out, config, images)
    judged = judge_shards(inputs, config, out / STATE / "judged")
    report = write_kept(inputs, judged, config, out)
    summary = report.summary()
    if not summary["kept"]:
        rule, count = next(iter(summary["dropped"].items()), ("no sample at all", 0))
        raise KoalaError(
            f"nothing is kept of {summary['samples']} samples; most often: {rule} ({count}): see filter in params.yaml"
        )
    report.write(out)
    run.metrics({name: summary[name] for name in ("samples", "kept", "kept_share")})
    run.metrics({f"dropped.{rule}": count for rule, count in summary["dropped"].items()})
    for name in FILES:
        run.artifact(out / name)
    say(f"filter: {summary['kept']} of {summary['samples']} samples kept ({summary['kept_share']:.1%})")
    manifest.write(out)
    shutil.rmtree(out / STATE)


def judge_shards(inputs: Sequence[Path], config: FilterConfig, folder: Path) -> list[Path]:
    """Write a judged table for each shard that has none in `folder`, and return all tables in the shards' order."""
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [folder / f"{shard.stem}.parquet" for shard in inputs]
    jobs = [(shard, output, config) for shard, output in zip(inputs, outputs, strict=True) if not output.is_file()]
    with _mapper(min(config.machine.processes, len(jobs))) as each:
        for _ in progress(each(_judge_shard, jobs), "filter: shards", total=len(inputs), done=len(inputs) - len(jobs)):
            pass
    return outputs


@contextmanager
def _mapper(processes: int) -> Iterator[Callable[[Callable[[Any], None], Iterable[Any]], Iterable[None]]]:
    """Provide `map`, in this process or over a pool whose workers end with this process."""
    if processes <= 1:
        yield map
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            yield pool.imap_unordered


def _judge_shard(job: tuple[Path, Path, FilterConfig]) -> None:
    shard, output, config = job
    manifest.verify(shard)
    rows = [judge(sample, config) for sample in read_shard(shard)]
    unfinished = output.with_suffix(".part")
    pq.write_table(pa.Table.from_pylist(rows, JUDGED), unfinished)
    os.replace(unfinished, output)


def judge(sample: Sample, config: FilterConfig) -> dict[str, Any]:
    """Return a row of `JUDGED`: the rule that the sample breaks by itself, and the hashes that detect duplicates."""
    view = look(sample.image)
    return {
        "key": sample.key,
        "url": sample.meta.get("url", ""),
        "caption": sample.caption,
        "rule": broken_rule(sample, view, config.rules),
        "sha256": hashlib.sha256(sample.image).digest(),
        "dhash": dhash(view.image) if view.image and config.near_duplicate_bits is not None else None,
    }


def write_kept(inputs: Sequence[Path], judged: Sequence[Path], config: FilterConfig, out: Path) -> FilterReport:
    """Write the samples that break no rule to shards in `out`, the others to its dropped.parquet."""
    for name in (*FILES, *(shard.name for shard in shards(out))):  # of an interrupted or an earlier call
        (out / name).unlink(missing_ok=True)
    report = FilterReport()
    duplicates = Duplicates(config.near_duplicate_bits)
    with (
        ShardWriter(out, config.shard_size) as writer,
        pq.ParquetWriter(out / "dropped.parquet", DROPPED) as drops,
    ):
        for shard, table in zip(inputs, judged, strict=True):
            dropped = []
            for sample, row in zip(read_shard(shard), pq.read_table(table).to_pylist(), strict=True):
                rule = row["rule"] or duplicates.add(row)
                if rule:
                    report.drop(sample, rule)
                    dropped.append({name: row[name] for name in ("key", "url", "caption")} | {"rule": rule})
                else:
                    report.keep(sample)
                    meta = {name: value for name, value in sample.meta.items() if name not in NOT_KEPT_META}
                    writer.write(replace(sample, meta=meta))
            drops.write_table(pa.Table.from_pylist(dropped, DROPPED))
    return report
