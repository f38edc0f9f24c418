"""Which samples are worth training on, and why the others are not.

The out holds the kept samples as shards, `dropped.parquet` (key, url, caption, rule), `report.json`, and plots. Rules
apply in the order of `RULES`, then the duplicates; the first rule that a sample breaks is the one it is counted under.
Of duplicates the first in the table's order stays.

Work is done shard by shard. What can be said of a sample by itself goes to runs/filter/.../judged/ and is not done
again by a run that was killed; duplicates, which take all samples, are found while the kept ones are written.
"""

import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from koala.console import progress, say
from koala.data.config import FilterConfig
from koala.data.shards import Sample, ShardWriter, read_shard, shards
from koala.errors import KoalaError
from koala.tracking import hash_tags
from koala.work import finish, resume_folder

if TYPE_CHECKING:
    from koala.config import Params
    from koala.tracking import StageRun

SHEET_KEPT, SHEET_PER_RULE = 48, 4  # pictures on the contact sheets
NOT_KEPT_META = ("exif", "status", "error_message")


def run(params: "Params", run: "StageRun") -> None:
    """Filter the download stage's samples. Raises KoalaError where nothing is kept."""
    config = params.filter
    source = params.need("download")
    inputs = shards(source)
    if not inputs:
        raise KoalaError(f"{source} holds no shards: run `dvc repro download` again")
    hashes = hash_tags(download=source)
    work = resume_folder("filter", config=config.model_dump(exclude={"processes"}), data=hashes)
    run.tags(hashes)

    judged = judge_shards(inputs, config, work / "judged")
    kept = work / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    outcome = write_kept(inputs, judged, config, kept)
    report = outcome.report()
    if not report["kept"]:
        rule, count = next(iter(report["dropped"].items()), ("no sample at all", 0))
        raise KoalaError(
            f"nothing is kept of {report['samples']} samples; most often: {rule} ({count}): see filter in params.yaml"
        )

    (kept / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    outcome.draw(kept)
    run.metrics({"samples": report["samples"], "kept": report["kept"], "kept_share": report["kept_share"]})
    run.metrics({f"dropped.{rule}": count for rule, count in report["dropped"].items()})
    for name in ("report.json", "rules.png", "words.png", "samples.png", "dropped.png"):
        run.artifact(kept / name)
    say(f"filter: {report['kept']} of {report['samples']} samples kept ({report['kept_share']:.1%})")
    finish(kept, params.out("filter"))
    shutil.rmtree(work)


# Rules on a sample by itself: each gives the name under which the sample is dropped, or None.


@dataclass(frozen=True)
class View:
    """A sample's decoded image, or the reason why there is none."""

    image: Image.Image | None
    fault: str | None = None


def look(data: bytes) -> View:
    """Decode an image of the three formats that there are in shards. Never more pixels than Pillow holds for safe."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
            image.load()
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            return View(None, "decompression_bomb")
        except Exception:  # Pillow's decoders raise whatever broken bytes lead them to
            return View(None, "undecodable")
    return View(image)


def unreadable(sample: Sample, view: View, config: FilterConfig) -> str | None:
    """`undecodable` or `decompression_bomb`."""
    return view.fault


def rotated(sample: Sample, view: View, config: FilterConfig) -> str | None:
    """Stored turned or mirrored, with a note in EXIF to turn it back, which img2dataset does not heed."""
    try:
        orientation = json.loads(sample.meta.get("exif") or "{}").get("Image Orientation", "")
    except (json.JSONDecodeError, AttributeError):
        return None
    return "rotated" if re.match("rotated|mirrored", str(orientation), re.IGNORECASE) else None


def too_small(sample: Sample, view: View, config: FilterConfig) -> str | None:
    return "too_small" if min(_original_size(sample, view)) < config.min_size else None


def too_long_a_shape(sample: Sample, view: View, config: FilterConfig) -> str | None:
    short, long = sorted(_original_size(sample, view))
    return "aspect" if long > config.max_aspect * short else None


def caption_length(sample: Sample, view: View, config: FilterConfig) -> str | None:
    words = count_words(sample.caption)
    if words < config.min_words:
        return "few_words"
    return "many_words" if words > config.max_words else None


def blocklisted(sample: Sample, view: View, config: FilterConfig) -> str | None:
    return "blocklist" if any(re.search(pattern, sample.caption) for pattern in config.blocklist) else None


def not_ascii(sample: Sample, view: View, config: FilterConfig) -> str | None:
    share = sum(character.isascii() for character in sample.caption) / max(len(sample.caption), 1)
    return "not_ascii" if share < config.min_ascii else None


def score(sample: Sample, view: View, config: FilterConfig) -> str | None:
    """`score.<column>`. A score that is missing, or is no number, is not good enough."""
    for column, least in config.min_scores.items():
        if not _number(sample, column) >= least:
            return f"score.{column}"
    for column, greatest in config.max_scores.items():
        if not _number(sample, column) <= greatest:
            return f"score.{column}"
    return None


RULES: tuple[Callable[[Sample, View, FilterConfig], str | None], ...] = (
    unreadable,
    rotated,
    too_small,
    too_long_a_shape,
    caption_length,
    blocklisted,
    not_ascii,
    score,
)


def broken_rule(sample: Sample, view: View, config: FilterConfig) -> str | None:
    """The first of `RULES` that the sample breaks."""
    return next((name for rule in RULES if (name := rule(sample, view, config))), None)


def count_words(caption: str) -> int:
    return len(caption.split())


def _original_size(sample: Sample, view: View) -> tuple[int, int]:
    """Width and height in pixels before the download resized the image."""
    width, height = sample.meta.get("original_width"), sample.meta.get("original_height")
    if width and height:
        return int(width), int(height)
    return view.image.size if view.image else (0, 0)


def _number(sample: Sample, column: str) -> float:
    value = sample.meta.get(column)
    return float(value) if isinstance(value, int | float) else float("nan")


# Judging: all that can be said of a sample by itself.


def judge_shards(inputs: list[Path], config: FilterConfig, folder: Path) -> list[Path]:
    """One parquet file a shard, in the same order; those that are there already are not made again."""
    folder.mkdir(exist_ok=True)
    outputs = [folder / f"{shard.stem}.parquet" for shard in inputs]
    jobs = [(shard, output, config) for shard, output in zip(inputs, outputs, strict=True) if not output.is_file()]
    with _mapper(min(config.processes, len(jobs))) as each:
        for _ in progress(each(_judge_shard, jobs), "filter: shards", total=len(inputs), done=len(inputs) - len(jobs)):
            pass
    return outputs


@contextmanager
def _mapper(processes: int) -> Iterator[Callable[[Callable[[Any], None], Iterable[Any]], Iterable[None]]]:
    """`map`, here or over a pool whose workers end when this process does."""
    if processes <= 1:
        yield map
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            yield pool.imap_unordered


def _judge_shard(job: tuple[Path, Path, FilterConfig]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    shard, output, config = job
    rows = [judge(sample, config) for sample in read_shard(shard)]
    fields = {"key": pa.string(), "url": pa.string(), "caption": pa.string(), "rule": pa.string()}
    schema = pa.schema(fields | {"sha256": pa.binary(), "dhash": pa.uint64()})
    unfinished = output.with_suffix(".part")
    pq.write_table(pa.Table.from_pylist(rows, schema), unfinished)
    os.replace(unfinished, output)


def judge(sample: Sample, config: FilterConfig) -> dict[str, Any]:
    """The rule that the sample breaks by itself, if any, and what is needed to know its duplicates."""
    view = look(sample.image)
    return {
        "key": sample.key,
        "url": sample.meta.get("url", ""),
        "caption": sample.caption,
        "rule": broken_rule(sample, view, config),
        "sha256": hashlib.sha256(sample.image).digest(),
        "dhash": dhash(view.image) if view.image and config.near_duplicate_bits is not None else None,
    }


def dhash(image: Image.Image) -> int:
    """A 64-bit difference hash: of a picture of 9 x 8 greys, whether each is darker than its right neighbour.

    Source: N. Krawetz, "Kind of Like That" (2013).
    """
    pixels = image.convert("L").resize((9, 8), Image.Resampling.LANCZOS).tobytes()
    value = 0
    for row in range(0, 72, 9):
        for left, right in zip(pixels[row : row + 8], pixels[row + 1 : row + 9], strict=True):
            value = value << 1 | (left < right)
    return value


# Duplicates: what takes all samples.


class Duplicates:
    """Tells a sample that was there before: by the image's bytes, by its URL, and, where asked for, by how it looks."""

    def __init__(self, bits: int | None) -> None:
        self._images: set[bytes] = set()
        self._urls: set[bytes] = set()
        self._near = NearDuplicates(bits) if bits is not None else None

    def rule(self, row: dict[str, Any]) -> str | None:
        """The rule by which a judged row is a duplicate of an earlier one; None remembers it."""
        url = hashlib.blake2b(row["url"].encode(), digest_size=16).digest()
        if row["sha256"] in self._images:
            return "duplicate_image"
        if row["url"] and url in self._urls:
            return "duplicate_url"
        if self._near and not self._near.add(row["dhash"]):
            return "near_duplicate"
        self._images.add(row["sha256"])
        self._urls.add(url)
        return None


class NearDuplicates:
    """A set of 64-bit hashes of which no two differ in `bits` bits or fewer.

    A hash is cut into bits + 1 bands: two that differ in `bits` bits at most are equal in one band at least, so only
    hashes that share a band are compared.
    """

    def __init__(self, bits: int) -> None:
        edges = [64 * number // (bits + 1) for number in range(bits + 2)]
        self._bits = bits
        self._bands = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
        self._known: list[dict[int, list[int]]] = [{} for _ in self._bands]

    def add(self, value: int) -> bool:
        """Add a hash; False, and nothing added, where one so near is there already."""
        parts = [value >> low & mask for low, mask in self._bands]
        for part, known in zip(parts, self._known, strict=True):
            if any((value ^ other).bit_count() <= self._bits for other in known.get(part, ())):
                return False
        for part, known in zip(parts, self._known, strict=True):
            known.setdefault(part, []).append(value)
        return True


# Writing what is kept, and telling what was not.


@dataclass
class Outcome:
    """Counts, and a few samples for a person to look at."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    shown: list[Sample] = field(default_factory=list)
    shown_dropped: dict[str, list[Sample]] = field(default_factory=dict)
    chance: random.Random = field(default_factory=lambda: random.Random(0))

    def keep(self, sample: Sample) -> None:
        self.kept += 1
        self.words[count_words(sample.caption)] += 1
        # Reservoir sampling (Vitter's algorithm R): every kept sample is as likely as another to be shown.
        place = len(self.shown) if len(self.shown) < SHEET_KEPT else self.chance.randrange(self.kept)
        if place < SHEET_KEPT:
            self.shown[place : place + 1] = [sample]

    def drop(self, sample: Sample, rule: str) -> None:
        self.dropped[rule] += 1
        shown = self.shown_dropped.setdefault(rule, [])
        if len(shown) < SHEET_PER_RULE:
            shown.append(sample)

    def report(self) -> dict[str, Any]:
        samples = self.kept + self.dropped.total()
        return {
            "samples": samples,
            "kept": self.kept,
            "kept_share": round(self.kept / max(samples, 1), 6),
            "dropped": dict(sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))),
            "caption_words": {str(words): count for words, count in sorted(self.words.items())},
        }

    def draw(self, folder: Path) -> None:
        """rules.png, words.png, samples.png (kept ones, at random) and dropped.png (the first ones of each rule)."""
        from koala.data.plots import bars, histogram, sheet

        report = self.report()
        bars({"kept": self.kept} | report["dropped"], "samples", f"{report['samples']} samples").savefig(
            folder / "rules.png"
        )
        words = dict(sorted(self.words.items()))
        histogram(words, "words in a caption", f"captions of {self.kept} kept samples").savefig(folder / "words.png")
        kept = sorted(self.shown, key=lambda sample: sample.key)
        sheet([(_thumbnail(sample), sample.caption) for sample in kept]).save(folder / "samples.png")
        dropped = [
            (_thumbnail(sample), f"{rule}: {sample.caption}")
            for rule in report["dropped"]
            for sample in self.shown_dropped[rule]
        ]
        sheet(dropped).save(folder / "dropped.png")


def _thumbnail(sample: Sample) -> Image.Image:
    return look(sample.image).image or Image.new("RGB", (32, 32), "lightgray")


def write_kept(inputs: list[Path], judged: list[Path], config: FilterConfig, folder: Path) -> Outcome:
    """Write the samples that break no rule to shards in `folder`, the others to its dropped.parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    outcome = Outcome()
    duplicates = Duplicates(config.near_duplicate_bits)
    schema = pa.schema({name: pa.string() for name in ("key", "url", "caption", "rule")})
    with (
        ShardWriter(folder, config.shard_size) as writer,
        pq.ParquetWriter(folder / "dropped.parquet", schema) as drops,
    ):
        for shard, verdicts in zip(inputs, judged, strict=True):
            dropped = []
            for sample, row in zip(read_shard(shard), pq.read_table(verdicts).to_pylist(), strict=True):
                rule = row["rule"] or duplicates.rule(row)
                if rule:
                    outcome.drop(sample, rule)
                    dropped.append({name: row[name] for name in ("key", "url", "caption")} | {"rule": rule})
                else:
                    outcome.keep(sample)
                    meta = {name: value for name, value in sample.meta.items() if name not in NOT_KEPT_META}
                    writer.write(replace(sample, meta=meta))
            drops.write_table(pa.Table.from_pylist(dropped, schema))
    return outcome
