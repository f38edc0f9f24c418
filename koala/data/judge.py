"""The filter's first pass: judges each sample by itself, a table a shard.

A table holds the values that rules measure, the rule that the sample breaks, and the fingerprints by which the second pass
finds duplicates. What an earlier run found of a sample that did not change (koala.data.earlier) is taken over.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from koala.console import progress
from koala.data import earlier, manifest
from koala.data.config import FilterConfig, Quota
from koala.data.earlier_verdicts import EarlierVerdicts, identity
from koala.data.executor import each
from koala.data.fingerprints import EMBEDDING_HASHES, LOOK_HASHES, dhash, pattern, plane_hashes, thumbnail
from koala.data.registration import miniature
from koala.data.rules.base import View, look, original_size
from koala.data.rules.language import Language
from koala.data.shards import Sample, read_shard
from koala.errors import KoalaError, line_of

FACTS = pa.schema(
    {
        "key": pa.string(),
        "url": pa.string(),
        "caption": pa.string(),
        "rule": pa.string(),  # the first rule that the sample breaks by itself, or null
        "sha256": pa.binary(32),  # of the image in the shard
        "dhash": pa.uint64(),
        "original_width": pa.int32(),
        "original_height": pa.int32(),
        "language": pa.string(),
        "license": pa.string(),
    }
)
"""Columns of a verdict that are known of a sample by itself. The measured values follow, float64."""
FINGERPRINTS = pa.schema(
    {
        "identity": pa.binary(32),  # koala.data.earlier_verdicts
        "position": pa.int64(),  # the shard's index * 2**32 + the row
        "fetched_sha256": pa.binary(32),  # of the file before the download resized it, where recorded
        "thumbnail": pa.binary(),
        "miniature": pa.binary(),  # JPEG
        "embedding": pa.binary(),  # float16
        **{name: pa.uint64() for name in (*LOOK_HASHES, *EMBEDDING_HASHES)},
    }
)
"""Columns that verdicts do not have."""
KEPT_FINGERPRINTS = ("identity", "fetched_sha256", "thumbnail", "miniature")
"""Those that a later run takes over. The others follow from them, or from the sample's place and scores."""
SCORER = b"scorer"
"""Metadata of a value's field that comes from a scorer: such values travel on with the sample."""


@dataclass(frozen=True)
class _Job:
    index: int
    shard: Path
    scores: Path | None
    output: Path
    config: FilterConfig
    known: EarlierVerdicts | None = None

    def stamp(self) -> str:
        """Return what a table is made from. One with another stamp is made again."""
        files = [file.stat() for file in (self.shard, self.scores) if file]
        state = [(file.st_size, file.st_mtime_ns) for file in files]
        recipe = self.config.recipe()
        return json.dumps(
            [self.index, self.shard.name, state, recipe["rules"], recipe["quotas"], FACTS.names, FINGERPRINTS.names]
        )

    def finished(self) -> bool:
        """Return whether the table is there."""
        return self.output.is_file() and pq.read_schema(self.output).metadata.get(b"stamp") == self.stamp().encode()


def judge_shards(
    inputs: Sequence[Path],
    config: FilterConfig,
    folder: Path,
    scores: Path | None = None,
    known: Callable[[], EarlierVerdicts | None] = lambda: None,
) -> list[Path]:
    """Write a judged table for each shard that has none in `folder`, and return all tables in the shards' order.

    scores: a folder with NAME.parquet for each shard NAME.tar: key, sha256, float32 columns and, if there is one, `embedding`.
    known: looks up what an earlier run has judged; called where a shard is to be judged.
    Raises KoalaError where a shard cannot be read, or its scores are missing or of other samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        _Job(
            index,
            shard,
            scores and scores / f"{shard.stem}.parquet",
            folder / f"{shard.stem}.parquet",
            config,
        )
        for index, shard in enumerate(inputs)
    ]
    for job in jobs:
        for file in (job.shard, job.scores):
            if file and not file.is_file():
                raise KoalaError(f"{file} is gone: make its folder again")
    pending = [job for job in jobs if not job.finished()]
    if pending and (found := known()):
        pending = [replace(job, known=found) for job in pending]
    with each(_judge_shard, pending, config.machine.processes, config.machine.engine) as finished:
        for _ in progress(finished, "filter: shards judged", total=len(jobs), done=len(jobs) - len(pending)):
            pass
    return [job.output for job in jobs]


def _judge_shard(job: _Job) -> None:
    manifest.verify(job.shard)
    stamp = job.stamp()
    scores = Scores.read(job.scores) if job.scores else None
    values = dict.fromkeys(name for rule in job.config.rules for name in rule.bounds())
    columns = [pa.field(name, pa.float64()) for name in values if not scores or name not in scores.names]
    if scores:
        columns += [pa.field(name, pa.float64(), metadata={SCORER: b"1"}) for name in scores.names]
    quotas = [field for index in range(len(job.config.quotas)) for field in quota_columns(index)]
    schema = pa.schema([*FACTS, *columns, *FINGERPRINTS, *quotas], metadata={"stamp": stamp})
    found, others = _known(job, scores)
    reused = len(found)
    for sample in _read(job, scores, others):
        found[sample.key] = _row(job, scores, sample, judge(sample, job.config) | {"identity": identity(sample)})
    if scores:
        scores.check(len(found))
    rows = [found[key] | {"position": (job.index << 32) + row} for row, key in enumerate(sorted(found))]
    _add_hashes(rows, "thumbnail", LOOK_HASHES, lambda pixels: pattern(np.frombuffer(pixels, np.uint8)[None])[0])
    _add_hashes(rows, "embedding", EMBEDDING_HASHES, lambda embedding: np.frombuffer(embedding, np.float16))
    earlier.note_reused(job.output.parent, job.output.stem, reused)
    unfinished = job.output.with_suffix(".part")
    pq.write_table(pa.Table.from_pylist(rows, schema), unfinished)
    os.replace(unfinished, job.output)


def _known(job: _Job, scores: "Scores | None") -> tuple[dict[str, dict[str, Any]], set[str] | None]:
    """Return the rows, by key, of the shard's samples that an earlier run has judged, and the keys of the others; None: all."""
    if job.known is None:
        return {}, None
    # Without their images, which need not be in memory together.
    samples = [(identity(sample), replace(sample, image=b"")) for sample in _read(job, scores)]
    judged = job.known.find([name for name, _ in samples])
    rows = {sample.key: _row(job, scores, sample, judged[name]) for name, sample in samples if name in judged}
    return rows, {sample.key for _, sample in samples} - rows.keys()


def _read(job: _Job, scores: "Scores | None", only: Container[str] | None = None) -> Iterator[Sample]:
    """Yield the samples of the shard, or those of some keys, with their scores if there are any."""
    for sample in read_shard(job.shard, only):
        yield scores.join(sample) if scores else sample


def _row(job: _Job, scores: "Scores | None", sample: Sample, judged: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample's columns: what was judged, and what follows from its place, its scores and the quotas."""
    row = {**judged, "key": sample.key, **(scores.of(sample) if scores else {})}
    return row | _counted(sample, row, job.config.quotas)


def _add_hashes(
    rows: Sequence[dict[str, Any]], fingerprint: str, names: Sequence[str], vector: Callable[[bytes], np.ndarray]
) -> None:
    """Add the hashes of a fingerprint's vector, under `names`, to the rows that have one."""
    there = [row for row in rows if row.get(fingerprint)]
    if there:
        vectors = np.stack([vector(row[fingerprint]) for row in there])
        for row, found in zip(there, plane_hashes(vectors), strict=True):
            row |= zip(names, map(int, found), strict=True)


def judge(sample: Sample, config: FilterConfig) -> dict[str, Any]:
    """Return a sample's `FACTS`, its measured values and its fingerprints."""
    view = look(sample.image)
    rule, values = view.fault, dict[str, float]()
    for each_rule in config.rules:
        found = each_rule.measure(sample, view)
        rule = rule or each_rule.broken(found)
        values |= found
    width, height = original_size(sample, view)
    facts = {
        "key": sample.key,
        "url": sample.text("url") or "",
        "caption": sample.caption,
        "rule": rule,
        "sha256": hashlib.sha256(sample.image).digest(),
        "original_width": width,
        "original_height": height,
        "language": _language(sample, config),
        "license": sample.text("license") or sample.text("licence"),
        "fetched_sha256": _fetched(sample),
    }
    # Not a number: the value is missing.
    return facts | {name: None if value != value else float(value) for name, value in values.items()} | _looks(view)


def quota_columns(index: int) -> tuple[pa.Field, pa.Field]:
    """Return the columns of a quota: the value that it counts by, and the score that it prefers."""
    return pa.field(f"quota_{index}", pa.string()), pa.field(f"best_{index}", pa.float64())


def _counted(sample: Sample, judged: Mapping[str, Any], quotas: Sequence[Quota]) -> dict[str, Any]:
    """Return a sample's values and scores for the quotas."""
    found: dict[str, Any] = {}
    for index, quota in enumerate(quotas):
        value, best = quota_columns(index)
        known = {"host": _host(judged["url"]), "language": judged["language"]}
        score = sample.number(quota.best) if quota.best else math.nan
        found[value.name] = known[quota.by] if quota.by in known else sample.text(quota.by)
        found[best.name] = None if math.isnan(score) else score
    return found


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # brackets that hold no address
        return None


def _language(sample: Sample, config: FilterConfig) -> str | None:
    return next((rule.language(sample.caption) for rule in config.rules if isinstance(rule, Language)), None)


def _fetched(sample: Sample) -> bytes | None:
    try:
        value = bytes.fromhex(sample.meta.get("sha256") or "")
    except (TypeError, ValueError):
        return None
    return value if len(value) == 32 else None


def _looks(view: View) -> dict[str, Any]:
    if view.small is None:
        return {}
    return {"dhash": dhash(view.small), "thumbnail": thumbnail(view.small), "miniature": miniature(view.small)}


class Scores:
    """A scorer's table of one shard."""

    def __init__(self, file: Path, table: pa.Table) -> None:
        """Take the table of `file`."""
        self._file = file
        self._sha256 = dict(zip(table["key"].to_pylist(), table["sha256"].to_pylist(), strict=True))
        self.names = [field.name for field in table.schema if pa.types.is_floating(field.type)]
        """Columns of scores."""
        self._scores = dict(zip(self._sha256, table.select(self.names).to_pylist(), strict=True))
        self._embeddings: dict[str, np.ndarray] = {}
        if "embedding" in table.column_names:
            column = table["embedding"].combine_chunks()
            flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float16)
            rows = zip(self._sha256, flat.reshape(-1, column.type.list_size), strict=True)
            self._embeddings = {key: row for key, row in rows if row.any()}  # zeros: the image could not be decoded

    @classmethod
    def read(cls, file: Path) -> "Scores":
        """Read a table. Raises KoalaError where it is none of a scorer's."""
        try:
            table = pq.read_table(file)
            return cls(file, table)
        except (OSError, pa.ArrowException, KeyError, ValueError, AttributeError) as error:
            raise KoalaError(f"{file} is no table of scores ({line_of(error)}): make the scores again") from None

    def join(self, sample: Sample) -> Sample:
        """Return a sample with its scores in `meta`. Raises KoalaError where the table is of other images."""
        if self._sha256.get(sample.key) != hashlib.sha256(sample.image).digest():
            raise KoalaError(f"{self._file} holds no scores of the image {sample.key}: make the scores again")
        return replace(sample, meta=sample.meta | self._scores[sample.key])

    def check(self, images: int) -> None:
        """Raise KoalaError where the table is of another number of images."""
        if images != len(self._sha256):
            raise KoalaError(
                f"{self._file} holds scores of {len(self._sha256)} images, not {images}: make the scores again"
            )

    def of(self, sample: Sample) -> dict[str, Any]:
        """Return a sample's scores and, if it has one, its embedding."""
        embedding = self._embeddings.get(sample.key)
        return {**self._scores[sample.key], "embedding": None if embedding is None else embedding.tobytes()}
