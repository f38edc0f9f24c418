"""The stage `filter`: keeps the samples worth training on, and reports why the others were dropped.

Three passes: each sample is judged by itself (koala.data.judge, a table an input shard), all are decided on together
(koala.data.decide), and the kept ones are written (here, an output shard at a time). Judging and writing run in several
processes. A killed run resumes after the last finished shard. Samples that an earlier run has judged are not judged again. The
bytes are the same whatever the number of processes and kills, and whatever was judged before.
"""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from koala.console import progress, say
from koala.data import earlier, manifest
from koala.data.config import FilterConfig
from koala.data.decide import Plan, decide
from koala.data.earlier_verdicts import earlier_verdicts
from koala.data.executor import each
from koala.data.filter_report import PAGE, PLOTS, SUMMARY, report
from koala.data.judge import SCORER, judge_shards
from koala.data.shards import Sample, read_shard, shards, write_shard
from koala.data.tally import FOLDER
from koala.errors import KoalaError
from koala.run import STATE, Run

NOT_KEPT_META = ("status", "error_message")


def filter(config: FilterConfig, images: Path, scores: Path, out: Path, run: Run) -> None:
    """Write the samples of `images` that are worth training on to shards in `out`.

    `out` also gets verdicts/NAME.parquet for each shard NAME.tar of `images` (what became of each sample and why), with
    judged/NAME.parquet (what a later run need not find again), and the report (koala.data.filter_report). `scores` holds a table
    of scores for each shard, or none.
    Raises KoalaError if nothing is kept, and for a shard that cannot be read.
    """
    inputs = shards(images)
    if not inputs:
        raise KoalaError(f"{images} holds no shards: run `dvc repro download` again")
    scored = scores if any(scores.glob("*.parquet")) else None
    folders = [images, scored] if scored else [images]
    for folder in folders:
        manifest.check(folder)
    manifest.resume(out, config, *folders)
    state = out / STATE
    known = partial(earlier_verdicts, out, config.machine.processes)
    judged = judge_shards(inputs, config, state / "judged", scored, known)
    plan = decide(judged, config, state, out)
    bounds = {name: ends for rule in config.rules for name, ends in rule.bounds().items()}
    summary = report(out / FOLDER, images, bounds, out)
    if not summary["kept"]:
        rule, count = next(iter(summary["dropped"].items()), ("no sample at all", 0))
        raise KoalaError(
            f"nothing is kept of {summary['samples']} samples; most often: {rule} ({count}): see filter in params.yaml"
        )
    write_kept(images, plan, config, out)
    run.metrics({name: summary[name] for name in ("samples", "kept", "kept_share")})
    reused = earlier.reused(state / "judged")
    run.metrics({"reused": reused, "new": summary["samples"] - reused})
    run.metrics({f"dropped.{rule}": count for rule, count in summary["dropped"].items()})
    for file in (out / SUMMARY, out / PAGE, *sorted((out / PLOTS).iterdir())):
        run.artifact(file)
    say(
        f"filter: {summary['kept']} of {summary['samples']} samples kept ({summary['kept_share']:.1%}), "
        f"{reused} of the judgements taken over from the last run"
    )
    manifest.write(out)
    shutil.rmtree(state)


@dataclass(frozen=True)
class _Job:
    output: Path
    unfinished: Path
    sources: tuple[tuple[Path, Path], ...]
    """Input shards, each with its verdicts."""


def write_kept(images: Path, plan: Plan, config: FilterConfig, out: Path) -> None:
    """Write the output shards that are not there yet."""
    jobs = [
        _Job(
            out / name,
            out / STATE / name,
            tuple((images / f"{source}.tar", out / FOLDER / f"{source}.parquet") for source in sources),
        )
        for name, sources in plan.items()
    ]
    pending = [job for job in jobs if not job.output.is_file()]
    with each(_write_shard, pending, config.machine.processes, config.machine.engine) as written:
        for _ in progress(written, "filter: shards written", total=len(jobs), done=len(jobs) - len(pending)):
            pass


def _write_shard(job: _Job) -> None:
    write_shard(job.output, _kept(job), job.unfinished)


def _kept(job: _Job) -> Iterator[Sample]:
    """Yield the samples of an output shard. Raises KoalaError where an input shard is not the one that was judged."""
    for shard, verdicts in job.sources:
        table = pq.read_table(verdicts)
        scores = [field.name for field in table.schema if SCORER in (field.metadata or {})]
        table = table.filter(pc.equal(table["shard"], job.output.name)).select(["key", "caption", "sha256", *scores])
        rows = {row["key"]: row for row in table.to_pylist()}
        for sample in read_shard(shard, rows):
            row = rows.pop(sample.key)
            if (hashlib.sha256(sample.image).digest(), sample.caption) != (row["sha256"], row["caption"]):
                raise KoalaError(
                    f"{shard} has changed since it was judged: run the filter again, without its work folder"
                )
            meta = {name: value for name, value in sample.meta.items() if name not in NOT_KEPT_META}
            yield replace(sample, meta=meta | {name: row[name] for name in scores})
        if rows:
            raise KoalaError(f"{shard} has lost {len(rows)} samples since it was judged: run the filter again")
