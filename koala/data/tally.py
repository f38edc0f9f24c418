"""Counts of the filter's verdicts, and choices of samples to look at.

DuckDB reads the parquet files as a stream: the memory that it takes does not grow with the number of samples. The same
verdicts give the same answers, whatever the order in which its threads come to them.
"""

import glob
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from koala.errors import KoalaError

if TYPE_CHECKING:
    import duckdb

FOLDER = "verdicts"
"""The folder of the verdicts in the filter's `out`."""

Bounds = Mapping[str, tuple[float | None, float | None]]
"""Measured value's name -> its least and its greatest value, None where there is no such bound."""

_INPUT = "input shard"  # the column that names the file; no table's column is called so
_MEMORY = "1GB"
_SAMPLED = 100_000  # samples by which the range of a histogram is chosen
_OUTLIERS = 0.005  # share at either end that is counted in the outermost bins
_RANDOM = "md5(key), key"  # an order by chance that is the same at each call
_HOST = r"(?i)^[a-z][a-z0-9+.-]*://(?:[^/?#@]*@)?([^/?#:]+)"


@dataclass(frozen=True)
class Verdict:
    """One sample, and what was decided of it."""

    shard: str
    """Name of the input shard that holds it, without the extension."""
    key: str
    """Its key there."""
    url: str
    """Where the image came from."""
    caption: str
    """Its caption."""
    rule: str | None
    """The rule that dropped it; None if it is kept."""
    dhash: int | None
    """Its perceptual hash."""
    values: Mapping[str, float]
    """Its measured values."""


@dataclass(frozen=True)
class Histogram:
    """Samples by a measured value. The outermost bins also count what lies beyond them."""

    edges: Sequence[float]
    """Ends of the bins."""
    kept: Sequence[int]
    """Kept samples in each bin."""
    dropped: Sequence[int]
    """Dropped samples in each bin."""
    whole: bool
    """Whether the values are whole numbers: each bin then begins and ends halfway between two."""


@contextmanager
def tally(verdicts: Path, scratch: Path) -> "Iterator[Tally]":
    """Provide a tally of the folder `verdicts`. Raises KoalaError if it holds none; `scratch` takes what memory does not."""
    files = sorted(verdicts.glob("*.parquet"))
    if not files:
        raise KoalaError(f"{verdicts} holds no verdicts: run `dvc repro filter` again")
    scratch.mkdir(parents=True, exist_ok=True)
    with connection(scratch) as database:
        names = ", ".join(string(glob.escape(str(file))) for file in files)
        database.execute(f"CREATE VIEW verdicts AS FROM read_parquet([{names}], filename = {string(_INPUT)})")
        yield Tally(database)
    shutil.rmtree(scratch)


@contextmanager
def connection(scratch: Path | None = None) -> "Iterator[duckdb.DuckDBPyConnection]":
    """Provide an empty database in memory, which fetches no extension and writes nowhere but to `scratch`."""
    import duckdb

    settings: dict[str, Any] = {
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "memory_limit": _MEMORY,
        "preserve_insertion_order": False,
        "temp_directory": str(scratch) if scratch else "",
    }
    with duckdb.connect(config=settings) as database:
        yield database


class Tally:
    """The verdicts of one run of the filter."""

    def __init__(self, database: "duckdb.DuckDBPyConnection") -> None:
        """Take a database with the view `verdicts`."""
        self._database = database
        self._types = {name: kind for name, kind, *_ in self._rows("DESCRIBE verdicts")}
        self.values = [name for name, kind in self._types.items() if kind == "DOUBLE"]
        """Names of the measured values."""
        ((self.samples, self.kept),) = self._rows("SELECT count(*), count(*) FILTER (rule IS NULL) FROM verdicts")

    def dropped(self) -> dict[str, int]:
        """Return the samples that each rule dropped, the most first."""
        return dict(
            self._rows(
                "SELECT rule, count(*) AS samples FROM verdicts WHERE rule IS NOT NULL GROUP BY rule ORDER BY samples DESC, rule"
            )
        )

    def caption_words(self) -> dict[int, int]:
        """Return the number of kept captions of each length in words."""
        words = quoted("words") if "words" in self.values else r"len(regexp_extract_all(caption, '\S+'))"
        return dict(
            self._rows(
                f"SELECT CAST({words} AS BIGINT) AS words, count(*) FROM verdicts "
                "WHERE rule IS NULL AND words IS NOT NULL GROUP BY ALL ORDER BY ALL"
            )
        )

    def means(self) -> dict[str, tuple[float, float]]:
        """Return mean and standard deviation of each value over the kept samples that have it."""
        if not self.values:
            return {}
        finite = [f"CASE WHEN isfinite({name}) THEN {name} END" for name in map(quoted, self.values)]
        asked = ", ".join(f"avg({value}), stddev_pop({value})" for value in finite)
        (found,) = self._rows(f"SELECT {asked} FROM verdicts WHERE rule IS NULL")
        pairs = zip(self.values, found[::2], found[1::2], strict=True)
        return {name: _rounded(mean, deviation) for name, mean, deviation in pairs if mean is not None}

    def histograms(self, bounds: Bounds, bins: int = 40) -> dict[str, Histogram]:
        """Return a histogram of each value that any sample has. A bound that is not far off lies within it."""
        if not self.values:
            return {}
        share = min(1.0, _SAMPLED / max(self.samples, 1))
        asked = ", ".join(
            f"quantile_cont(CASE WHEN isfinite({name}) THEN {name} END, [{_OUTLIERS}, {1 - _OUTLIERS}]), "
            f"bool_and({name} = floor({name})) FILTER (isfinite({name}))"
            for name in map(quoted, self.values)
        )
        # Chosen by the key's hash, since quantiles of all samples would need memory for all of them.
        (found,) = self._rows(
            f"SELECT {asked} FROM verdicts WHERE md5_number_lower(key) <= ?", int(share * (2**64 - 1))
        )
        pairs = zip(self.values, found[::2], found[1::2], strict=True)
        return {
            name: self._histogram(name, _edges(ends, bounds.get(name, (None, None)), whole, bins), whole)
            for name, ends, whole in pairs
            if ends is not None
        }

    def _histogram(self, name: str, edges: Sequence[float], whole: bool) -> Histogram:
        value, bins, width = quoted(name), len(edges) - 1, edges[1] - edges[0]
        counts = {True: [0] * bins, False: [0] * bins}
        for number, kept, count in self._rows(
            f"SELECT CAST(greatest(0, least(?, floor(({value} - ?) / ?))) AS BIGINT) AS bin, rule IS NULL, count(*) "
            f"FROM verdicts WHERE isfinite({value}) GROUP BY ALL",
            bins - 1,
            edges[0],
            width,
        ):
            counts[kept][number] = count
        return Histogram(edges, counts[True], counts[False], whole)

    def languages(self) -> list[tuple[str | None, int, int]]:
        """Return the 20 most frequent languages with their samples and how many are kept; None is a language not known."""
        return self._most_frequent("language")

    def hosts(self) -> list[tuple[str | None, int, int]]:
        """Return the 20 most frequent hosts of URLs with their samples and how many are kept."""
        return self._most_frequent(f"nullif(lower(regexp_extract(url, '{_HOST}', 1)), '')")

    def licenses(self) -> list[tuple[str | None, int, int]]:
        """Return the 20 most frequent licences, where samples have them, with their samples and how many are kept."""
        return self._most_frequent("license")

    def _most_frequent(self, expression: str) -> list[tuple[str | None, int, int]]:
        found = self._rows(
            f"SELECT {expression} AS name, count(*) AS samples, count(*) FILTER (rule IS NULL) FROM verdicts "
            "GROUP BY ALL ORDER BY samples DESC, name NULLS LAST LIMIT 20"
        )
        return [] if [name for name, *_ in found] == [None] else found

    def kept_at_random(self, count: int) -> list[Verdict]:
        """Return kept samples."""
        return self._verdicts("rule IS NULL", _RANDOM, count)

    def dropped_by(self, rule: str, count: int) -> list[Verdict]:
        """Return samples that the rule dropped, at random."""
        return self._verdicts("rule = ?", _RANDOM, count, rule)

    def just_passed(self, value: str, side: Literal["least", "greatest"], bound: float, count: int) -> list[Verdict]:
        """Return the kept samples whose value is nearest to its bound."""
        name = quoted(value)
        order, beyond = (f"{name} DESC", "<=") if side == "greatest" else (name, ">=")
        condition = f"rule IS NULL AND isfinite({name}) AND {name} {beyond} ?"
        return self._verdicts(condition, f"{order}, {_RANDOM}", count, bound)

    def groups(self, largest: int, at_random: int) -> dict[int, int]:
        """Return duplicate groups with the number of their samples: the largest, then some of the others."""
        sizes = 'SELECT "group", count(*) AS size FROM verdicts WHERE "group" IS NOT NULL GROUP BY "group"'
        first = dict(self._rows(f'{sizes} ORDER BY size DESC, "group" LIMIT ?', largest))
        others = self._rows(
            f'SELECT * FROM ({sizes}) WHERE NOT list_contains(?, "group") ORDER BY md5(CAST("group" AS VARCHAR)) LIMIT ?',
            list(first),
            at_random,
        )
        return first | dict(others)

    def group_count(self) -> int:
        """Return the number of duplicate groups."""
        ((count,),) = self._rows('SELECT count(DISTINCT "group") FROM verdicts')
        return int(count)

    def group(self, number: int, count: int) -> list[Verdict]:
        """Return samples of a duplicate group, the kept one first."""
        return self._verdicts('"group" = ?', "rule IS NOT NULL, key", count, number)

    def _verdicts(self, condition: str, order: str, count: int, *parameters: Any) -> list[Verdict]:
        values = "".join(f", {quoted(name)}" for name in self.values)
        rows = self._rows(
            f"SELECT parse_filename({quoted(_INPUT)}, true), key, url, caption, rule, dhash{values} FROM verdicts "
            f"WHERE {condition} ORDER BY {order} LIMIT {count}",
            *parameters,
        )
        return [
            Verdict(
                shard,
                key,
                url or "",
                caption or "",
                rule,
                dhash,
                {name: value for name, value in zip(self.values, measured, strict=True) if _is_number(value)},
            )
            for shard, key, url, caption, rule, dhash, *measured in rows
        ]

    def _rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return self._database.execute(query, parameters).fetchall()


def quoted(name: str) -> str:
    """Return a column's name as SQL has it."""
    return '"' + name.replace('"', '""') + '"'


def string(text: str) -> str:
    """Return text as SQL has it."""
    return "'" + text.replace("'", "''") + "'"


def is_outside(value: float, least: float | None, greatest: float | None) -> bool:
    """Return whether a value breaks one of its bounds."""
    return (least is not None and value < least) or (greatest is not None and value > greatest)


def _rounded(mean: float, deviation: float) -> tuple[float, float]:
    """Return both with six digits: the order in which threads add shows in the last ones."""
    return float(f"{mean:.6g}"), float(f"{deviation:.6g}") if deviation > 1e-6 * abs(mean) else 0.0


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _edges(
    ends: tuple[float, float], bounds: tuple[float | None, float | None], whole: bool, bins: int
) -> Sequence[float]:
    """Return the ends of at most `bins` bins of one width between two values; a bound that is not far off lies within."""
    span = ends[1] - ends[0]
    near = [bound for bound in bounds if bound is not None and ends[0] - span <= bound <= ends[1] + span]
    low, high = min(*ends, *near), max(*ends, *near)
    if whole:
        first, values = math.floor(low), math.ceil(high) - math.floor(low) + 1
        width = math.ceil(values / bins)
        return [first - 0.5 + width * number for number in range(math.ceil(values / width) + 1)]
    step = (high - low) / bins or 1.0
    return [low + step * number for number in range(bins + 1)]
