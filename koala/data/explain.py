"""The command `koala data explain`: a sample's way through the artifacts, from the table to its latent."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from glob import escape as literal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from koala.console import harmless, show
from koala.data.tally import FOLDER, connection, is_outside, quoted, string
from koala.errors import KoalaError

if TYPE_CHECKING:
    import duckdb

Row = Mapping[str, Any]

_FILE = "parquet_file"
"""Column that names the file of a row."""
_MEMBERS = 20  # of a duplicate group


@dataclass(frozen=True)
class Value:
    """A measured value beside its bounds."""

    value: float | None
    """None if it was not measured."""
    least: float | None
    """The least that the rules let through."""
    greatest: float | None
    """The greatest that the rules let through."""
    outside: bool
    """Whether it breaks a bound."""


@dataclass(frozen=True)
class Way:
    """What the artifacts hold of a sample. None: the stage has not run. Empty: it has, and has no such sample."""

    key: str | None
    """Its key, by which shards know it; None before the download."""
    url: str | None
    """Where its image is."""
    table: Row | None
    """Its row in the table of the stage `source`."""
    download: Row | None
    """What the stage `download` said of it."""
    verdict: Row | None
    """What the stage `filter` decided: rule, output shard, hashes."""
    latent: Row | None
    """What the stage `encode` made of it: file, row, bucket, crop."""
    values: Mapping[str, Value] = field(default_factory=dict)
    """What the filter measured."""
    group: Sequence[Row] = ()
    """Samples of its duplicate group, the kept one first: key, url, rule."""
    others: Sequence[str] = ()
    """Keys of further samples that have its URL."""


def explain(sample: str, table: Path, images: Path, kept: Path, latents: Path) -> Way:
    """Return the way of the sample with a key or a URL through four artifacts, each of which may be missing.

    Raises KoalaError if none of them knows it, or one cannot be read.
    """
    import duckdb

    try:
        with connection() as database:
            way = _way(_Artifacts(database), sample, table, images, kept, latents)
    except duckdb.Error as error:
        raise KoalaError(f"an artifact cannot be read: {error}: make it again") from None
    if not (way.table or way.download or way.verdict or way.latent):
        raise KoalaError(f"no artifact of this profile knows {sample!r}: give a sample's key, or a URL of the table")
    return way


def _way(artifacts: "_Artifacts", sample: str, table: Path, images: Path, kept: Path, latents: Path) -> Way:
    verdicts = kept / FOLDER
    known = [
        row
        for folder in (images, verdicts, latents)
        for column in ("key", "url")
        for row in artifacts.rows(folder, column, sample) or ()
    ]
    keys = list(dict.fromkeys(row["key"] for row in known if row["key"] is not None))
    key = keys[0] if keys else None
    url = next((row["url"] for row in known if row["key"] == key and row.get("url")), None if key else sample)
    verdict = artifacts.first(verdicts, "key", key)
    values, group = {}, []
    if verdict:
        bounds = json.loads((kept / "report.json").read_text())["bounds"]
        values = {name: _value(verdict.pop(name), bounds.get(name)) for name in artifacts.numbers(verdicts)}
        group = artifacts.group(verdicts, verdict["group"])
    return Way(
        key=key,
        url=url,
        table=artifacts.first(table, "url", url),
        download=artifacts.first(images, "key", key),
        verdict=verdict,
        latent=artifacts.first(latents, "key", key),
        values=values,
        group=group,
        others=keys[1:],
    )


def _value(value: float | None, bounds: tuple[float | None, float | None] | None) -> Value:
    least, greatest = bounds or (None, None)
    if value is None:
        return Value(None, least, greatest, outside=False)
    return Value(value, least, greatest, is_outside(value, least, greatest))


class _Artifacts:
    """Rows of folders of parquet files."""

    def __init__(self, database: "duckdb.DuckDBPyConnection") -> None:
        self._database = database

    def first(self, folder: Path, column: str, value: str | None) -> dict[str, Any] | None:
        """Return the row of a folder in which a column has a value; empty if there is none, None if there is no folder."""
        rows = self.rows(folder, column, value)
        return rows if rows is None else next(iter(rows), {})

    def rows(self, folder: Path, column: str, value: str | None) -> list[dict[str, Any]] | None:
        """Return all such rows, ordered by key where they have one; none where a folder has no such column."""
        columns = self._columns(folder)
        if columns is None:
            return None
        if column not in columns or value is None:
            return []
        order = " ORDER BY key" if "key" in columns else ""
        return self._found(f"SELECT * FROM {_files(folder)} WHERE {quoted(column)} = ?{order}", value)

    def numbers(self, folder: Path) -> list[str]:
        """Return the names of a folder's columns of float64: measured values."""
        return [name for name, kind in (self._columns(folder) or {}).items() if kind == "DOUBLE"]

    def group(self, folder: Path, number: int | None) -> list[dict[str, Any]]:
        """Return samples of a duplicate group, the kept one first."""
        if number is None:
            return []
        members = f'SELECT key, url, rule FROM {_files(folder)} WHERE "group" = ?'
        return self._found(f"{members} ORDER BY rule IS NOT NULL, key LIMIT {_MEMBERS}", number)

    def _columns(self, folder: Path) -> dict[str, str] | None:
        """Return a folder's columns with their types; None if it has no parquet file."""
        if not any(folder.glob("*.parquet")):
            return None
        return {row["column_name"]: row["column_type"] for row in self._found(f"DESCRIBE FROM {_files(folder)}")}

    def _found(self, query: str, *parameters: Any) -> list[dict[str, Any]]:
        cursor = self._database.execute(query, parameters)
        names = [name for name, *_ in cursor.description or ()]
        return [
            {name: _plain(name, value) for name, value in zip(names, row, strict=True)} for row in cursor.fetchall()
        ]


def _files(folder: Path) -> str:
    """Return SQL for all rows of a folder; the column _FILE names the file of each."""
    files = string(f"{literal(str(folder))}/*.parquet")
    read = f"read_parquet({files}, filename = '{_FILE}', union_by_name = true)"
    return f"(SELECT * REPLACE (parse_filename({_FILE}) AS {_FILE}) FROM {read})"


def _plain(name: str, value: Any) -> Any:
    """Return a value as JSON can hold it: hashes as hexadecimal digits, None for what is not a number."""
    if name == "dhash" and value is not None:
        return f"{value:016x}"
    if isinstance(value, bytes):
        return value.hex()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# What the command gives.


def show_way(way: Way, as_json: bool) -> None:
    """Show a sample's way, for people or as JSON."""
    if as_json:
        show(json.dumps(asdict(way), indent=2, default=str))
        return
    console = Console(highlight=False)
    for line in _lines(way):
        console.print(line, soft_wrap=isinstance(line, Text))


def _lines(way: Way) -> Iterator[Text | Table]:
    yield _text(f"{way.key or 'no key yet'}  {way.url or ''}", "bold")
    if way.others:
        yield _text(f"also with this URL: {', '.join(way.others[:_MEMBERS])}")
    yield from _stage("table", "source", way.table, _facts(way.table, ("url",)))
    download, verdict, latent = way.download or {}, way.verdict or {}, way.latent or {}
    sizes = {
        "cause": download.get("error_message"),
        "fetched": _size(download.get("original_width"), download.get("original_height")),
        "stored": _size(download.get("width"), download.get("height")),
        "sha256": download.get("sha256"),
    }
    yield from _stage(
        "images", "download", way.download, {"status": download.get("status"), **_where(download), **sizes}
    )
    rule = verdict.get("rule")
    decided = {
        "verdict": f"dropped: {rule}" if rule else "kept",
        **_where(verdict),
        "output shard": verdict.get("shard"),
    }
    told = ("rule", "shard", "url", "key", "caption", "group", "original_width", "original_height")
    yield from _stage("kept", "filter", way.verdict, decided | _facts(way.verdict, told))
    if way.values:
        yield _values(way.values)
    if way.group:
        yield _text("")
        yield from _group(way.group, way.key)
    made = {
        "error": latent.get("error"),
        "latents": latent.get("file"),
        "row": latent.get("row"),
        "bucket": _size(latent.get("bucket_width"), latent.get("bucket_height")),
        "crop": latent.get("file")
        and f"{latent.get('crop_left')} from the left, {latent.get('crop_top')} from the top",
        "flipped": latent.get("file") and ("yes" if latent.get("flipped") else "no"),
    }
    yield from _stage("latents", "encode", way.latent, made)


def _stage(noun: str, stage: str, row: Row | None, facts: Row) -> Iterator[Text | Table]:
    """Yield the heading of an artifact and, where it holds the sample, its facts."""
    if not row:
        yield _text(f"\n{noun}: {'not in it' if row is not None else f'the stage {stage} has not run'}", "bold")
        return
    yield _text(f"\n{noun}", "bold")
    said = {name: value for name, value in facts.items() if value is not None}
    yield from _aligned(
        [
            (_text(name, "dim"), _text(value, "red" if name in ("cause", "error") else ""))
            for name, value in said.items()
        ]
    )


def _where(row: Row) -> dict[str, str]:
    return {"input shard": f"{Path(row[_FILE]).stem}.tar"} if row else {}


def _facts(row: Row | None, but: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in (row or {}).items() if name not in (*but, _FILE)}


def _size(width: int | None, height: int | None) -> str | None:
    return f"{width} x {height} px" if width and height else None


def _values(values: Mapping[str, Value]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("measured")
    for heading in ("value", "at least", "at most"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for name, found in values.items():
        figures = (
            f"{number:.4g}" if number is not None else "-" for number in (found.value, found.least, found.greatest)
        )
        style = "red" if found.outside else ""
        table.add_row(
            _text(name, style), *(_text(figure, style) for figure in figures), "outside" if found.outside else ""
        )
    return table


def _group(members: Sequence[Row], key: str | None) -> Iterator[Text]:
    rows = [tuple(_text(heading, "bold") for heading in ("duplicates", "", "url"))]
    for member in members:
        name = f"{member['key']}{' (this)' if member['key'] == key else ''}"
        rows.append((_text(name), _text(member["rule"] or "kept"), _text(member["url"] or "")))
    yield from _aligned(rows)


def _aligned(rows: Sequence[tuple[Text, ...]]) -> Iterator[Text]:
    """Yield a line for each row, its cells below each other. A long last cell is not folded: it can be copied whole."""
    widths = [max(cell.cell_len for cell in column) for column in zip(*rows, strict=True)]
    for *cells, last in rows:
        line = Text("  ")
        for cell, width in zip(cells, widths, strict=False):
            cell.pad_right(width - cell.cell_len + 4)
            line.append_text(cell)
        yield line.append_text(last)


def _text(value: object, style: str = "") -> Text:
    """Return text of which a terminal obeys nothing, and rich takes nothing for markup."""
    text = str(value)
    return Text(text[: len(text) - len(text.lstrip("\n"))] + harmless(text), style, overflow="fold")
