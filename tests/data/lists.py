"""Lists of URLs in files of every format, and the table that the stage `source` makes of them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from koala.data.source import source
from koala.data.tables import TableSource


def make(out: Path, recorder: Any, **config: Any) -> pa.Table:
    """Run the stage; its table."""
    source(TableSource(**config), out=out, run=recorder)
    return pq.read_table(sorted(out.glob("*.parquet")))


def dropped(out: Path) -> dict[str, int]:
    return json.loads((out / "stats.json").read_text())["dropped"]


ROWS: list[dict[str, Any]] = [
    {"link": "https://example.com/1.jpg", "text": "a horse", "aesthetic": 5, "extra": "x"},
    {"link": None, "text": "no url", "aesthetic": 5, "extra": "x"},
    {"link": "https://example.com/2.jpg", "text": None, "aesthetic": 5, "extra": "x"},
    {"link": "https://example.com/3.jpg", "text": "  ", "aesthetic": 5, "extra": "x"},
    {"link": "file:///etc/passwd", "text": "a file of mine", "aesthetic": 5, "extra": "x"},
    {"link": "ftp://example.com/4.jpg", "text": "an old server", "aesthetic": 5, "extra": "x"},
    {"link": "http://169.254.169.254/latest/meta-data", "text": "a cloud's secrets", "aesthetic": 5, "extra": "x"},
    {"link": "http://nas.Internal:80/7.jpg", "text": "an office's disk", "aesthetic": 5, "extra": "x"},
    {"link": "http://example.com:8080/5.jpg", "text": "a zebra", "aesthetic": None, "extra": "x"},
    {"link": "http://example.com/6.jpg", "text": "an ass", "aesthetic": 6.5, "extra": "x"},
]


def packed(name: str, content: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(content)
    return pa.compress(content, "zstd", asbytes=True) if name.endswith(".zst") else content


def write(file: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    name = file.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), file)
        return file
    if name.endswith((".csv", ".tsv")):
        sink = pa.BufferOutputStream()
        pa.csv.write_csv(
            pa.Table.from_pylist(rows), sink, pa.csv.WriteOptions(delimiter="\t" if name.endswith(".tsv") else ",")
        )
        content = sink.getvalue().to_pybytes()
    elif name.endswith(".json"):
        content = json.dumps({str(number): row for number, row in enumerate(rows)}, indent=1).encode()
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(packed(file.name, content))
    return file


COLUMNS = {"url_column": "link", "caption_column": "text", "score_columns": ["aesthetic"]}


def urls(*names: object) -> list[dict[str, Any]]:
    return [{"link": f"https://example.com/{name}.jpg", "text": f"number {name}", "aesthetic": 5} for name in names]
