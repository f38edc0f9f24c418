"""What the flow `watch` looks at beside the source: parameters, and the comparison of two reports of the filter.

Keep this module light to import: it is read with params.yaml.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from koala.config import Config


class FilterLimits(Config):
    """How far the filter's newest report may be from the one that the champion was trained by. Left out: not looked at."""

    shares: float | None = Field(default=None, gt=0, le=1)
    """Greatest difference of a share of the samples: of those that are kept, and of those that each rule drops."""
    caption_words: float | None = Field(default=None, gt=0)
    """Greatest change of the mean length of the kept captions, in words, as a share of the champion's: 0.1 is 10 %."""
    values: float | None = Field(default=None, gt=0)
    """Greatest change of the mean of each measured value (scores, sizes) over the kept samples, in the champion's standard
    deviations."""


class ChampionLimits(Config):
    """Scores by which the release that stands is measured again. It takes as long as its evaluation did."""

    scores: tuple[str, ...] = ()
    """Names of scores such as `attributes/all`. One whose mean on the release's own prompts and seeds is below the release's
    95 % interval starts a retraining."""


class WatchConfig(Config):
    """What else than a change of the source starts a retraining. By default nothing."""

    teacher: str | None = None
    """Branch of the teacher's repository on the Hub, such as `main`: a new commit there becomes the teacher's revision."""
    filter: FilterLimits = FilterLimits()
    """Limits of the filter's report beside the champion's."""
    champion: ChampionLimits = ChampionLimits()
    """The champion measured again. By default it is not."""


Report = Mapping[str, Any]
"""report.json of the filter."""


def drift(limits: FilterLimits, now: Report, then: Report) -> list[str]:
    """Return a line for each limit that the report `now` exceeds beside `then`."""
    return [
        *_shares(limits.shares, now, then),
        *_words(limits.caption_words, now, then),
        *_values(limits.values, now, then),
    ]


def _shares(limit: float | None, now: Report, then: Report) -> Iterator[str]:
    ours, theirs = _shares_of(now), _shares_of(then)
    for what in {**theirs, **ours}:
        before, after = theirs.get(what, 0.0), ours.get(what, 0.0)
        if limit is not None and abs(after - before) > limit:
            yield f"{what}: {before:.1%} -> {after:.1%} of the samples"


def _shares_of(report: Report) -> dict[str, float]:
    counts = {"kept": report["kept"], **{f"dropped by {rule}": count for rule, count in report["dropped"].items()}}
    return {what: count / max(report["samples"], 1) for what, count in counts.items()}


def _words(limit: float | None, now: Report, then: Report) -> Iterator[str]:
    before, after = _mean_words(then), _mean_words(now)
    if limit is not None and before and abs(after / before - 1) > limit:
        yield f"words of a caption: {before:.1f} -> {after:.1f}"


def _mean_words(report: Report) -> float:
    counts: Mapping[str, int] = report["caption_words"]
    return sum(int(words) * count for words, count in counts.items()) / max(sum(counts.values()), 1)


def _values(limit: float | None, now: Report, then: Report) -> Iterator[str]:
    """Compare the values that both have: a report of an older koala has none."""
    ours, theirs = now.get("values", {}), then.get("values", {})
    for name in theirs:
        before, after = theirs[name]["mean"], ours.get(name, theirs[name])["mean"]
        if limit is not None and abs(after - before) > limit * theirs[name]["deviation"]:
            yield f"mean of {name}: {before:.4g} -> {after:.4g}"
