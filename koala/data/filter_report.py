"""Report of the filter: counts by rule, a histogram of caption lengths, contact sheets of kept and dropped samples."""

import json
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from koala.data.rules import count_words, look
from koala.data.shards import Sample
from koala.plots import bars, contact_sheet, histogram

REPORT = "report.json"
FILES = (REPORT, "rules.png", "words.png", "samples.png", "dropped.png")
SHEET_KEPT, SHEET_PER_RULE = 48, 4
"""Images on the contact sheets."""


@dataclass
class FilterReport:
    """Counts of kept and dropped samples, with a few samples to show."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    _shown: list[Sample] = field(default_factory=list)
    _shown_dropped: dict[str, list[Sample]] = field(default_factory=dict)
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def keep(self, sample: Sample) -> None:
        """Count a kept sample."""
        self.kept += 1
        self.words[count_words(sample.caption)] += 1
        # Reservoir sampling (Vitter's algorithm R): every kept sample is equally likely to be shown.
        place = len(self._shown) if len(self._shown) < SHEET_KEPT else self._random.randrange(self.kept)
        if place < SHEET_KEPT:
            self._shown[place : place + 1] = [sample]

    def drop(self, sample: Sample, rule: str) -> None:
        """Count a sample dropped under `rule`."""
        self.dropped[rule] += 1
        shown = self._shown_dropped.setdefault(rule, [])
        if len(shown) < SHEET_PER_RULE:
            shown.append(sample)

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

    def write(self, folder: Path) -> None:
        """Write `FILES`. samples.png shows kept samples at random, dropped.png the first samples of each rule."""
        summary = self.summary()
        title = f"{summary['samples']} samples"
        bars({"kept": self.kept} | summary["dropped"], "samples", title).savefig(folder / "rules.png")
        words = dict(sorted(self.words.items()))
        histogram(words, "words in a caption", f"captions of {self.kept} kept samples").savefig(folder / "words.png")
        kept = sorted(self._shown, key=lambda sample: sample.key)
        _sheet((sample, sample.caption) for sample in kept).save(folder / "samples.png")
        dropped = ((sample, rule) for rule in summary["dropped"] for sample in self._shown_dropped[rule])
        _sheet((sample, f"{rule}: {sample.caption}") for sample, rule in dropped).save(folder / "dropped.png")
        (folder / REPORT).write_text(json.dumps(summary, indent=2) + "\n")


def _sheet(samples: Iterable[tuple[Sample, str]]) -> Image.Image:
    blank = Image.new("RGB", (32, 32), "lightgray")
    return contact_sheet([(look(sample.image).image or blank, text) for sample, text in samples])
