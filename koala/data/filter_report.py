"""Report of the filter: counts by rule, a histogram of caption lengths, contact sheets of kept and dropped samples."""

import json
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from koala.data.rules.base import look
from koala.data.rules.words import count_words
from koala.data.shards import Sample, read_shard
from koala.plots import bars, contact_sheet, histogram

REPORT = "report.json"
FILES = (REPORT, "rules.png", "words.png", "samples.png", "dropped.png")
SHEET_KEPT, SHEET_PER_RULE = 48, 4
"""Images on the contact sheets."""

Place = tuple[str, str]
"""Name of an input shard, key of a sample."""


class FilterReport:
    """Counts of kept and dropped samples, with a few samples to show."""

    def __init__(self, verdicts: Path) -> None:
        """Read the verdicts: a table for each input shard."""
        self.kept = 0
        self.dropped: Counter[str] = Counter()
        self.words: Counter[int] = Counter()
        self._shown: list[Place] = []
        self._shown_dropped: dict[str, list[Place]] = {}
        self._random = random.Random(0)
        for file in sorted(verdicts.glob("*.parquet")):
            for row in pq.read_table(file, columns=["key", "caption", "rule"]).to_pylist():
                place = (file.stem, row["key"])
                if row["rule"]:
                    self._drop(place, row["rule"])
                else:
                    self._keep(place, row["caption"])

    def _keep(self, place: Place, caption: str) -> None:
        self.kept += 1
        self.words[count_words(caption)] += 1
        # Reservoir sampling (Vitter's algorithm R): every kept sample is equally likely to be shown.
        index = len(self._shown) if len(self._shown) < SHEET_KEPT else self._random.randrange(self.kept)
        if index < SHEET_KEPT:
            self._shown[index : index + 1] = [place]

    def _drop(self, place: Place, rule: str) -> None:
        self.dropped[rule] += 1
        shown = self._shown_dropped.setdefault(rule, [])
        if len(shown) < SHEET_PER_RULE:
            shown.append(place)

    def summary(self) -> dict[str, Any]:
        """Return the counts, as report.json holds them."""
        samples = self.kept + self.dropped.total()
        return {
            "samples": samples,
            "kept": self.kept,
            "kept_share": round(self.kept / max(samples, 1), 6),
            "dropped": dict(sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))),
            "caption_words": {str(words): count for words, count in sorted(self.words.items())},
        }

    def write(self, images: Path, folder: Path) -> None:
        """Write `FILES`. samples.png shows kept samples at random, dropped.png the first samples of each rule."""
        summary = self.summary()
        title = f"{summary['samples']} samples"
        bars({"kept": self.kept} | summary["dropped"], "samples", title).savefig(folder / "rules.png")
        words = dict(sorted(self.words.items()))
        histogram(words, "words in a caption", f"captions of {self.kept} kept samples").savefig(folder / "words.png")
        dropped = {rule: self._shown_dropped[rule] for rule in summary["dropped"]}
        found = _samples(images, [*self._shown, *(place for places in dropped.values() for place in places)])
        kept = [found[place] for place in sorted(self._shown)]
        _sheet((sample, sample.caption) for sample in kept).save(folder / "samples.png")
        shown = ((found[place], rule) for rule, places in dropped.items() for place in places)
        _sheet((sample, f"{rule}: {sample.caption}") for sample, rule in shown).save(folder / "dropped.png")
        (folder / REPORT).write_text(json.dumps(summary, indent=2) + "\n")


def _samples(images: Path, places: Iterable[Place]) -> dict[Place, Sample]:
    keys: dict[str, set[str]] = {}
    for shard, key in places:
        keys.setdefault(shard, set()).add(key)
    return {
        (shard, sample.key): sample
        for shard, only in keys.items()
        for sample in read_shard(images / f"{shard}.tar", only)
    }


def _sheet(samples: Iterable[tuple[Sample, str]]) -> Image.Image:
    blank = Image.new("RGB", (32, 32), "lightgray")
    return contact_sheet([(look(sample.image).image or blank, text) for sample, text in samples])
