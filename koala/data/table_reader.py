"""Reads the columns of a table file that are asked for, as types that do not depend on the values.

Text formats are read by Polars, as text, then cast: a score that is an integer in the first rows and a fraction later, a
key that comes late, or a nested column that nobody asked for is no reason to refuse a file. No format needs more memory for
a longer file: parquet is read by pyarrow, page by page, since Polars reads row groups ahead, and whole; JSON lines come to
Polars some megabytes at a time, since it would map the whole file.
"""

import codecs
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.data.table_config import TableConfig
from koala.data.table_files import first_line, format_of
from koala.errors import KoalaError

if TYPE_CHECKING:
    import polars as pl

BATCH = 50_000
"""Rows that are worked on at a time."""
PAGES = 2**20
"""Bytes of a parquet column that are read at a time."""
LINES = 2**23
"""Bytes of JSON lines that are read at a time."""
LOOK = 1_000
"""Lines of JSON whose keys are listed where a column is missing."""


def read(file: Path, name: str, config: TableConfig) -> "Iterator[pl.DataFrame]":
    """Yield batches of the columns that `config` names: text for URL and caption, float64 for scores and bounds.

    Args:
        file: The file on this disk.
        name: What messages call it.
        config: Names the columns and how files are written.

    Raises:
        KoalaError: The file cannot be read, lacks a column, or holds something else in one.
    """
    import polars as pl
    import pyarrow as pa

    try:
        if format_of(file.name) == "parquet":
            yield from _parquet(file, name, config)
            return
        columns = _casts(dict.fromkeys(config.wanted, pl.String()), name, config)
        for frame in _json(file, name, config) if format_of(file.name) == "json" else [_csv(file, name, config)]:
            yield from frame.select(columns).collect_batches(chunk_size=BATCH, maintain_order=True)
    except (pl.exceptions.PolarsError, pa.ArrowException, OSError, ValueError, EOFError, zlib.error) as error:
        raise KoalaError(f"cannot read the table {name}: {first_line(error)}") from None


def _parquet(file: Path, name: str, config: TableConfig) -> "Iterator[pl.DataFrame]":
    """Yield batches of a parquet file, which may be one row group: no more than a few pages of a column are held."""
    import polars as pl
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file, buffer_size=PAGES, pre_buffer=False) as parquet:
        _check(config.wanted, parquet.schema_arrow.names, name)
        columns: list[pl.Expr] = []
        for batch in parquet.iter_batches(BATCH, columns=list(config.wanted), use_threads=False):
            frame = pl.DataFrame(batch)
            columns = columns or _casts(frame.schema, name, config)
            yield frame.select(columns)


def _casts(schema: "Mapping[str, pl.DataType]", name: str, config: TableConfig) -> "list[pl.Expr]":
    """Return the columns that `config` names, as the types that the table has. Raises KoalaError where one cannot be."""
    return [_cast(column, schema[column], name, config) for column in config.wanted]


def _csv(file: Path, name: str, config: TableConfig) -> "pl.LazyFrame":
    """Return the columns of a CSV or TSV file as text. Raises KoalaError if one is missing."""
    import polars as pl

    frame = pl.scan_csv(
        glob.escape(str(file)),
        separator="," if format_of(file.name) == "csv" else "\t",
        quote_char='"' if config.quoted else None,
        has_header=not config.columns,
        new_columns=config.columns or None,
        infer_schema=False,
    )
    _check(config.wanted, list(frame.collect_schema()), name)
    return frame


def _check(wanted: Sequence[str], there: Sequence[str], name: str) -> None:
    """Raise KoalaError with the columns that there are if one is missing."""
    if lacking := [column for column in wanted if column not in there]:
        shown = ", ".join(there[:40]) + (f" and {len(there) - 40} more" if len(there) > 40 else "")
        raise KoalaError(
            f"{name} has no column {lacking[0]!r} (it has {shown or 'none'}): set url_column, caption_column, "
            "score_columns, carry and where of source in params.yaml"
        )


def _cast(column: str, kind: "pl.DataType", name: str, config: TableConfig) -> "pl.Expr":
    """Return a column as the type that the table has. Raises KoalaError if it cannot be that."""
    import polars as pl

    value = pl.col(column)
    is_text = isinstance(kind, pl.String | pl.Categorical | pl.Enum)
    if column in (config.url_column, config.caption_column):
        if not is_text:
            raise KoalaError(f"{name}: column {column!r} holds {kind}, not text: choose another column in params.yaml")
        return value.cast(pl.String)
    if column in config.score_columns or column in config.where:
        if is_text:
            text = value.cast(pl.String).str.strip_chars()
            return pl.when(text != "").then(text).cast(pl.Float64).alias(column)
        if not (kind.is_numeric() or isinstance(kind, pl.Boolean | pl.Null)):
            raise KoalaError(f"{name}: column {column!r} holds {kind}, not numbers: choose another in params.yaml")
        return value.cast(pl.Float64)
    if kind.is_nested() or isinstance(kind, pl.Binary | pl.Object):
        raise KoalaError(
            f"{name}: column {column!r} holds {kind}, neither text nor numbers: take it out of source.carry"
        )
    if kind.is_integer() and not isinstance(kind, pl.UInt64 | pl.Int128 | pl.UInt128):
        return value.cast(pl.Int64)
    return value.cast(pl.Float64 if kind.is_float() or kind.is_decimal() else pl.String)


# JSON.


def _json(file: Path, name: str, config: TableConfig) -> "Iterator[pl.LazyFrame]":
    """Yield the columns of JSON lines, or of one document (an array of rows, or rows by key), as text.

    Raises KoalaError if a column is missing.
    """
    import polars as pl

    with _opened(file) as stream:
        head = list(islice(stream, LOOK))
    document = None if _is_lines(head) else _document(file)
    rows = map(_loaded, head) if document is None else iter(document[:LOOK])
    keys = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)

    def frames(columns: Sequence[str]) -> "Iterator[pl.LazyFrame]":
        schema = dict.fromkeys(columns, pl.String())
        if document is None:
            return (pl.scan_ndjson(io.BytesIO(lines), schema=schema) for lines in _lines(file))
        return iter(
            [pl.LazyFrame({column: [_text(row.get(column)) for row in document] for column in columns}, schema)]
        )

    if late := [column for column in config.wanted if column not in keys]:
        for frame in frames(late):  # a look at every row: the key may come later
            keys |= dict.fromkeys(column.name for column in frame.collect() if column.null_count() < len(column))
    _check(config.wanted, list(keys), name)
    yield from frames(config.wanted)


def _lines(file: Path) -> Iterator[bytes]:
    """Yield whole lines of a file, some megabytes at a time."""
    rest = b""
    with _opened(file) as stream:
        if (mark := stream.read(3)) != codecs.BOM_UTF8:
            rest = mark
        while block := stream.read(LINES):
            lines, _, rest = (rest + block).rpartition(b"\n")
            if lines.strip():
                yield lines
    if rest.strip():
        yield rest


def _opened(file: Path) -> io.BufferedIOBase:
    """Open a file, decompressed by its ending."""
    if file.suffix == ".gz":
        return gzip.open(file)
    if file.suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(file, compression="zstd"))
    return file.open("rb")


def _is_lines(head: Sequence[bytes]) -> bool:
    """Return whether a file is JSON lines by its first lines, and no document of several lines."""
    first = next((line for line in head if line.strip()), b"{}").strip()
    if len(head) == 1:  # one row, or a document without line breaks
        row = _loaded(first)
        return not (isinstance(row, list) or (isinstance(row, dict) and row and _are_rows(list(row.values()))))
    return not first.startswith(b"[") and (first != b"{" and isinstance(_loaded(first), dict))


def _loaded(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _are_rows(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(each, dict) for each in values)


def _document(file: Path) -> list[dict[str, Any]] | None:
    """Return the rows of a JSON document; None where it is none."""
    with _opened(file) as stream:
        try:
            found = json.load(stream)
        except ValueError:
            return None
    rows = list(found.values()) if isinstance(found, dict) else found
    return rows if _are_rows(rows) else None


def _text(value: Any) -> str | None:
    if value is None:
        return None
    # Half of a surrogate pair, as a text that was cut may end, is no Unicode.
    return value.encode(errors="replace").decode() if isinstance(value, str) else json.dumps(value)
