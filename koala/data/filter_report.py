"""Report of the filter: report.html for people, report.json for programs, and plots for MLflow.

It is made from the verdicts alone (koala.data.tally); of the images, those that it shows are read from the input shards.
"""

import io
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from koala.console import harmless
from koala.data import filter_page
from koala.data.filter_page import Pictures, Sheets, Shown
from koala.data.rules.base import look
from koala.data.shards import read_shard
from koala.data.tally import Bounds, Histogram, Tally, Verdict, is_outside, tally
from koala.page import THUMBNAIL
from koala.plots import bars, contact_sheet, histogram, tiles
from koala.run import STATE

PAGE, SUMMARY, PLOTS = "report.html", "report.json", "plots"
_KEPT, _OF_RULE, _NEAR_BOUND, _OF_GROUP = 32, 8, 8, 8
"""Samples that are shown: of all that are kept, of each rule, at each bound, of each group."""
_LARGEST, _OTHER_GROUPS = 6, 6
_NAME = 80  # characters


def report(verdicts: Path, images: Path, bounds: Bounds, out: Path) -> dict[str, Any]:
    """Write the report to `out`, and return what report.json holds.

    Args:
        verdicts: The folder of the filter's verdicts, a parquet file for each input shard.
        images: The folder of the input shards.
        bounds: The rules' bounds on measured values, in the rules' order.
        out: Gets report.html, report.json and plots/*.png.

    Raises KoalaError if there are no verdicts.
    """
    with tally(verdicts, scratch=out / STATE / "duckdb") as of:
        summary = _summary(of, bounds)
        histograms = of.histograms(bounds)
        kept = [(verdict, "") for verdict in of.kept_at_random(_KEPT)]
        passed = {
            f"{name} {words} {bound:g}": [(verdict, f"{name} {verdict.values[name]:.4g}") for verdict in found]
            for name, ends in bounds.items()
            for side, words, bound in zip(("least", "greatest"), ("at least", "at most"), ends, strict=True)
            if bound is not None and name in of.values
            if (found := of.just_passed(name, side, bound, _NEAR_BOUND))  # type: ignore[arg-type]
        }
        dropped = {
            rule: [(verdict, _why(verdict, bounds)) for verdict in of.dropped_by(rule, _OF_RULE)]
            for rule in summary["dropped"]
        }
        groups = {
            f"{size:,} samples, group {number}": _of_group(of.group(number, _OF_GROUP))
            for number, size in of.groups(_LARGEST, _OTHER_GROUPS).items()
        }
        frequent = {"Languages": of.languages(), "Hosts": of.hosts(), "Licences": of.licenses()}
    sheets = {"kept": {"": kept}, "just_passed": passed, "dropped": dropped, "duplicates": groups}
    pictures = _pictures(
        images, [verdict for sheet in sheets.values() for shown in sheet.values() for verdict, _ in shown]
    )
    plots = {name: _plot(name, found, bounds, summary["samples"]) for name, found in histograms.items()}
    _write_plots(out / PLOTS, summary, plots, sheets, pictures)
    filter_page.write(out / PAGE, summary, plots, frequent, kept, passed, dropped, groups, pictures)
    (out / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _summary(of: Tally, bounds: Bounds) -> dict[str, Any]:
    return {
        "samples": of.samples,
        "kept": of.kept,
        "kept_share": round(of.kept / max(of.samples, 1), 6),
        "dropped": of.dropped(),
        "duplicate_groups": of.group_count(),
        "bounds": {name: list(ends) for name, ends in bounds.items()},
        "values": {name: {"mean": mean, "deviation": deviation} for name, (mean, deviation) in of.means().items()},
        "caption_words": {str(words): count for words, count in of.caption_words().items()},
    }


def _why(verdict: Verdict, bounds: Bounds) -> str:
    """Return the measured values that are out of bounds."""
    broken = {
        name: value for name, value in verdict.values.items() if is_outside(value, *bounds.get(name, (None, None)))
    }
    return ", ".join(f"{name} {value:.4g}" for name, value in broken.items())


def _of_group(found: Sequence[Verdict]) -> list[Shown]:
    """Return the samples of a group, each with the bits in which its hash differs from the kept one's."""
    first = found[0]
    return [(verdict, _relation(verdict, first)) for verdict in found]


def _relation(verdict: Verdict, first: Verdict) -> str:
    if verdict.rule is None:
        return "kept"
    if verdict.dhash is None or first.dhash is None:
        return verdict.rule
    return f"{verdict.rule}, {(verdict.dhash ^ first.dhash).bit_count()} bits"


# Images and plots.


def _pictures(images: Path, wanted: Iterable[Verdict]) -> Pictures:
    """Read the samples' images, a shard at a time."""
    keys: dict[str, set[str]] = {}
    for verdict in wanted:
        keys.setdefault(verdict.shard, set()).add(verdict.key)
    pictures = {}
    for shard in sorted(keys):
        for sample in read_shard(images / f"{shard}.tar", keys[shard]):
            if image := look(sample.image).image:
                small = image.convert("RGB")
                small.thumbnail((THUMBNAIL, THUMBNAIL))
                pictures[shard, sample.key] = small
    return pictures


def _write_plots(
    folder: Path,
    summary: Mapping[str, Any],
    plots: Mapping[str, bytes],
    sheets: Mapping[str, Sheets],
    pictures: Pictures,
) -> None:
    """Write funnel.png, values.png (all histograms) and a contact sheet of each of `sheets` that shows any sample."""
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier call, with other rules perhaps
    folder.mkdir(parents=True)
    counts = {"downloaded": summary["samples"], **summary["dropped"], "kept": summary["kept"]}
    bars(counts, "samples", f"{summary['samples']:,} samples").savefig(folder / "funnel.png")
    if plots:
        drawn = [Image.open(io.BytesIO(plot)).convert("RGB") for plot in plots.values()]
        tiles(drawn, across=min(3, len(drawn))).save(folder / "values.png")
    for name, sheet in sheets.items():
        shown = [
            (verdict, _joined(title, said, harmless(verdict.caption)))
            for title, samples in sheet.items()
            for verdict, said in samples
        ]
        if shown:
            _sheet(shown, pictures).save(folder / f"{name}.png")


def _joined(*parts: str) -> str:
    return ": ".join(part for part in parts if part)


def _sheet(shown: Sequence[Shown], pictures: Pictures) -> Image.Image:
    blank = Image.new("RGB", (32, 32), "lightgray")
    return contact_sheet([(pictures.get((verdict.shard, verdict.key), blank), text) for verdict, text in shown])


def _plot(name: str, found: Histogram, bounds: Bounds, samples: int) -> bytes:
    """Return a histogram as PNG."""
    least, greatest = bounds.get(name, (None, None))
    said = [f"{words} {bound:g}" for words, bound in (("at least", least), ("at most", greatest)) if bound is not None]
    if missing := samples - sum(found.kept) - sum(found.dropped):
        said.append(f"{missing:,} without")
    # Between whole numbers the line stands between two bars.
    half = 0.5 if found.whole else 0.0
    lines = [
        bound + shift * (bound == round(bound))
        for bound, shift in ((least, -half), (greatest, half))
        if bound is not None
    ]
    inside = [line for line in lines if found.edges[0] <= line <= found.edges[-1]]
    title = f"{name[:_NAME]}: {', '.join(said)}" if said else name[:_NAME]
    content = io.BytesIO()
    figure = histogram(found.edges, {"kept": found.kept, "dropped": found.dropped}, inside, title, found.whole)
    figure.savefig(content, format="png")
    return content.getvalue()
