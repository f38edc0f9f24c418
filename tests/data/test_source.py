import gzip
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext as does_not_raise
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from koala.data import rows, table_reader
from koala.data import source as stage
from koala.data.presets import PRESETS, Preset
from koala.data.rows import Seen, url_fault
from koala.data.source import source, write_parts
from koala.data.table_files import format_of
from koala.data.tables import TableSource
from koala.errors import KoalaError


def make(out: Path, recorder: Any, **config: Any) -> pa.Table:
    """Run the stage; its table."""
    source(TableSource(**config), out=out, run=recorder)
    return pq.read_table(sorted(out.glob("*.parquet")))


def dropped(out: Path) -> dict[str, int]:
    return json.loads((out / "stats.json").read_text())["dropped"]


# Tables from disk.

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


NAMES = [
    "t.parquet",
    "t.csv",
    "t[1].csv.gz",
    "t.csv.zst",
    "t.tsv",
    "t.jsonl",
    "t[1].jsonl.gz",
    "t.jsonl.zst",
    "t.json.gz",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_table(out: Path, recorder: Any, name: str) -> None:
    write(Path(name))
    table = make(out, recorder, kind="file", location=name, **COLUMNS)
    assert table.to_pylist() == [
        {"url": "https://example.com/1.jpg", "caption": "a horse", "aesthetic": 5.0},
        {"url": "http://example.com:8080/5.jpg", "caption": "a zebra", "aesthetic": None},
        {"url": "http://example.com/6.jpg", "caption": "an ass", "aesthetic": 6.5},
    ]
    assert table.schema.types == [pa.string(), pa.string(), pa.float64()]
    assert json.loads((out / "stats.json").read_text()) == {
        "rows": 3,
        "dropped": {"no_caption": 2, "no_url": 1, "not_http": 2, "private_host": 2},
    }


def urls(*names: object) -> list[dict[str, Any]]:
    return [{"link": f"https://example.com/{name}.jpg", "text": f"number {name}", "aesthetic": 5} for name in names]


def test_several_files_up_to_a_number_of_rows(out: Path, recorder: Any) -> None:
    """What comes after the last row that is wanted is neither read nor counted."""
    folder = Path("tables")
    folder.mkdir()
    write(folder / "b.csv", urls(1, 2))
    write(folder / "a.parquet", [*urls(3), ROWS[1], *urls(4), ROWS[2], *urls(5)])
    (folder / "never.csv").write_text("this is not read: enough rows came before")
    config = {"kind": "file", "location": "tables", "files": ["b.csv", "a.parquet", "never.csv"], "rows": 4} | COLUMNS
    assert [caption[-1] for caption in make(out, recorder, **config)["caption"].to_pylist()] == ["1", "2", "3", "4"]
    assert dropped(out) == {"no_url": 1}


@pytest.mark.parametrize(
    ("location", "files", "found"),
    [
        ("lists", [], ["1", "2", "3"]),
        ("lists/*.csv", [], ["1", "2"]),
        ("lists", ["c*.parquet", "[ab].csv"], ["3", "1", "2"]),
        ("lists", ["*/d.csv", "b.csv"], ["4", "2"]),
    ],
)
def test_folders_and_patterns(out: Path, recorder: Any, location: str, files: list[str], found: list[str]) -> None:
    Path("lists/deep").mkdir(parents=True)
    for number, name in enumerate(("a.csv", "b.csv", "c.parquet", "deep/d.csv"), 1):
        write(Path("lists", name), urls(number))
    Path("lists/README.md").write_text("no table")
    table = make(out, recorder, kind="file", location=location, files=files, **COLUMNS)
    assert [caption[-1] for caption in table["caption"].to_pylist()] == found


@pytest.mark.parametrize("location", ["empty", "lists/*.csv"])
def test_a_place_without_tables_is_said(out: Path, recorder: Any, location: str) -> None:
    Path("empty").mkdir()
    with pytest.raises(KoalaError, match=r"^(empty holds no table|there is no file lists/\*.csv): set source.location"):
        make(out, recorder, kind="file", location=location)


# What may be odd in a valid file.


def test_text_with_line_breaks_and_numbers_that_become_fractions(out: Path, recorder: Any) -> None:
    """More of it than any look at the first rows sees."""
    count = 30_000
    lines = [f'https://example.com/{number}.jpg,"a ""{number}""\nof, many",{number % 7}\n' for number in range(count)]
    content = "\ufefflink,text,aesthetic\n" + "".join(lines) + f'https://example.com/x.jpg,"{"long " * 300_000}",6.5\n'
    Path("t.csv").write_text(content)
    table = make(out, recorder, kind="file", location="t.csv", **COLUMNS)
    assert table.num_rows == count + 1
    assert table["caption"][12_345].as_py() == 'a "12345"\nof, many'
    assert table["aesthetic"][count].as_py() == 6.5


def test_keys_that_come_late_and_nested_ones_that_nobody_asked_for(out: Path, recorder: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"link": f"https://example.com/{number}.jpg", "text": "a", "box": {"a": [number, {"b": None}]}}
        for number in range(3_000)
    ]
    rows[-1] |= {"aesthetic": 6.5, "licence": "by"}
    rows[-2] |= {"aesthetic": 6, "licence": 7}
    rows[-3] |= {"aesthetic": "5", "box": "none"}
    write(Path("t.jsonl"), rows)
    table = make(out, recorder, kind="file", location="t.jsonl", carry=["licence"], **COLUMNS)
    assert table.slice(2_996).to_pydict() == {
        "url": [row["link"] for row in rows[-4:]],
        "caption": ["a"] * 4,
        "aesthetic": [None, 5.0, 6.0, 6.5],
        "licence": [None, None, "7", "by"],
    }


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n\n \n"])
def test_lines_of_json_come_whole_from_whatever_blocks(
    out: Path, recorder: Any, monkeypatch: pytest.MonkeyPatch, ending: bytes
) -> None:
    """Also lines longer than a block, blank ones, and a last one without an end."""
    monkeypatch.setattr(table_reader, "LINES", 900)
    rows = urls(*range(1_500))
    rows[700]["text"] = "long " * 200
    rows[-1]["licence"] = "by"
    content = b"\n\n".join(json.dumps(row).encode() for row in rows)
    Path("t.jsonl").write_bytes(content + ending)
    table = make(out, recorder, kind="file", location="t.jsonl", carry=["licence"], **COLUMNS)
    assert table["url"].to_pylist() == [row["link"] for row in rows]
    assert table["caption"][700].as_py() == "long " * 200
    assert table["licence"].null_count == 1_499
    with pytest.raises(KoalaError, match=r"^t.jsonl has no column 'id' \(it has link, text, aesthetic\)"):
        make(out, recorder, kind="file", location="t.jsonl", carry=["id"], **COLUMNS)


def test_a_tsv_without_header_and_quotes(out: Path, recorder: Any) -> None:
    Path("cc12m.tsv").write_text(
        'https://a.com/1.jpg\t"a" fox\nhttps://a.com/2.jpg\tan "open one\nhttps://a.com/3.jpg\tb\n'
    )
    table = make(out, recorder, kind="file", preset="cc12m", location="cc12m.tsv")
    assert table["caption"].to_pylist() == ['"a" fox', 'an "open one', "b"]


@pytest.mark.parametrize(
    "document", ['[{"url": "https://a.com/1.jpg", "caption": "a"}]', '{"url": "https://a.com/1.jpg", "caption": "a"}']
)
def test_json_in_one_line(out: Path, recorder: Any, document: str) -> None:
    Path("t.json").write_text(document)
    assert make(out, recorder, kind="file", location="t.json").to_pylist() == [
        {"url": "https://a.com/1.jpg", "caption": "a"}
    ]


def test_json_lines_may_begin_with_a_byte_order_mark(out: Path, recorder: Any) -> None:
    """As CSV may, and as editors on Windows write it."""
    Path("t.jsonl").write_text(
        '\ufeff{"url": "https://a.com/1.jpg", "caption": "a"}\n{"url": "https://a.com/2.jpg", "caption": "b"}\n'
    )
    assert make(out, recorder, kind="file", location="t.jsonl")["caption"].to_pylist() == ["a", "b"]


def test_half_a_surrogate_pair_refuses_no_document(out: Path, recorder: Any) -> None:
    """A caption that was cut in the middle of an emoji."""
    Path("t.json").write_text(
        '[{"url": "https://a.com/1.jpg", "caption": "a \\ud83d"},\n{"url": "https://a.com/2.jpg", "caption": "b"}]'
    )
    assert make(out, recorder, kind="file", location="t.json")["caption"].to_pylist() == ["a ?", "b"]


@pytest.mark.parametrize("rows", [100, 20_000])
@pytest.mark.parametrize("name", ["t.csv.gz", "t.csv.zst", "t.jsonl.gz", "t.jsonl.zst", "t.json.gz", "t.parquet"])
def test_half_a_file_is_one_line_and_no_table(out: Path, recorder: Any, name: str, rows: int) -> None:
    """Also where it is cut between two rows, which a reader of lines takes for the end."""
    content = write(Path(name), urls(*range(rows))).read_bytes()
    Path(name).write_bytes(content[: len(content) // 2])
    with pytest.raises(KoalaError, match=f"^cannot read the table {name}: [^\n]*$"):
        make(out, recorder, kind="file", location=name, **COLUMNS)
    assert list(out.iterdir()) == []


def peak_of_reading(size: int) -> int:
    """Read a list of `size` rows in one row group, in a separate process. Return its peak of memory."""
    values = np.random.default_rng(0).bytes(250 * size).hex()
    captions = [values[first : first + 500] for first in range(0, 500 * size, 500)]
    table = pa.table({"url": captions, "caption": captions, "unread": captions})
    pq.write_table(table, "t.parquet", row_group_size=size, use_dictionary=False)
    code = """
from pathlib import Path
from koala.bench.data_worker import peak
from koala.data.table_reader import read
from koala.data.tables import TableSource
for _ in read(Path("t.parquet"), "t", TableSource(kind="file", location="t.parquet")):
    pass
print(peak())
"""
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_a_long_list_takes_the_memory_of_a_short_one(out: Path) -> None:
    """The long one has 400 MB more. A batch, its copies and what the allocators keep are some 100 MB."""
    assert peak_of_reading(500_000) < peak_of_reading(100_000) + 250e6


# What is carried, bounded and dropped.


def test_columns_are_carried_along(out: Path, recorder: Any) -> None:
    rows = [{**row, "licence": "by", "id": 2**60 + number, "share": 0.5} for number, row in enumerate(urls(1, 2))]
    carry = ["id", "licence", "share"]
    write(Path("t.parquet"), rows)
    table = make(out, recorder, kind="file", location="t.parquet", carry=carry, **COLUMNS)
    assert table.schema.names == ["url", "caption", "aesthetic", *carry]
    assert table.schema.types[3:] == [pa.int64(), pa.string(), pa.float64()]
    assert table["id"].to_pylist() == [2**60, 2**60 + 1]
    write(Path("t.csv"), rows)
    table = make(out, recorder, kind="file", location="t.csv", carry=carry, **COLUMNS)
    assert table["id"].to_pylist() == [str(2**60), str(2**60 + 1)]
    with pytest.raises(KoalaError, match=r"^t.csv: column 'id' holds string, and int64 in files before"):
        make(out, recorder, kind="file", location=".", files=["t.parquet", "t.csv"], carry=carry, **COLUMNS)
    write(Path("t.parquet"), [{**row, "boxes": [1]} for row in rows])
    with pytest.raises(KoalaError, match=r"^t.parquet: column 'boxes' holds List\(Int64\), neither text nor numbers"):
        make(out, recorder, kind="file", location="t.parquet", carry=["boxes"], **COLUMNS)


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.jsonl"])
def test_bounds_apply_before_the_download(out: Path, recorder: Any, name: str) -> None:
    rows = urls(*range(6))
    for row, score, width in zip(rows, (4.9, 5, 7, 7.1, None, 6), (900, 900, 900, 900, 900, 500), strict=True):
        row |= {"aesthetic": score, "WIDTH": width}
    write(Path(name), [*rows, ROWS[1] | {"WIDTH": 900}])
    where = {"aesthetic": {"at_least": 5, "at_most": 7}, "WIDTH": {"at_least": 512}}
    table = make(out, recorder, kind="file", location=name, where=where, **(COLUMNS | {"score_columns": []}))
    assert table["caption"].to_pylist() == ["number 1", "number 2"]
    assert table.schema.names == ["url", "caption"]
    assert dropped(out) == {"no_url": 1, "where.WIDTH": 1, "where.aesthetic": 3}


def test_what_is_not_a_number_is_within_no_bounds(out: Path, recorder: Any) -> None:
    write(Path("t.parquet"), [row | {"aesthetic": float("nan")} for row in urls(1)] + urls(2))
    where = {"aesthetic": {"at_least": 1}}
    assert (
        make(out, recorder, kind="file", location="t.parquet", where=where, **COLUMNS)["caption"][0].as_py()
        == "number 2"
    )
    assert dropped(out) == {"where.aesthetic": 1}


def test_of_equal_urls_the_first_usable_stays(out: Path, recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_reader, "BATCH", 3)
    rows = urls(1, 2, 1, 3, 2, 4, 1)
    rows[0]["text"] = None
    rows[4]["link"] = f" {rows[4]['link']}\t"
    write(Path("a.csv"), rows)
    write(Path("b.parquet"), urls(4, 5))
    table = make(out, recorder, kind="file", location=".", files=["a.csv", "b.parquet"], **COLUMNS)
    assert [url[-5] for url in table["url"].to_pylist()] == ["2", "1", "3", "4", "5"]
    assert dropped(out) == {"duplicate_url": 3, "no_caption": 1}
    assert recorder.logged["dropped.duplicate_url"] == 3


@pytest.mark.parametrize("piece", [rows.PIECE, 64])
def test_hashes_are_seen_once(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PIECE", piece)
    random = np.random.default_rng(0)
    seen, known = Seen(), set[int]()
    for _ in range(50):
        hashes = random.integers(0, 5_000, int(random.integers(1, 400)), dtype=np.uint64)
        among = random.random(len(hashes)) < 0.7
        wanted = []
        for each, counts in zip(hashes.tolist(), among.tolist(), strict=True):
            wanted.append(counts and each not in known)
            known |= {each} if counts else set()
        assert seen.new(hashes, among).tolist() == wanted
    assert sum(map(len, seen._runs)) == len(known)
    assert len(seen._runs) < 15
    assert all((run.base is not None) == (len(run) >= piece) for run in seen._runs), "long runs are mapped"


def numbers(count: int, size: int) -> Iterator[pa.Table]:
    for first in range(0, count, size):
        column = [str(number) for number in range(first, min(first + size, count))]
        yield pa.table({"url": column, "caption": column})


def test_parts_hold_the_rows_in_order_whatever_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "GROUP_ROWS", 30)
    contents = []
    for size in (7, 100, 1_000):
        (tmp_path / "part-00009.parquet").write_bytes(b"of a longer list")
        (tmp_path / "part-00001.part").write_bytes(b"of a run that was killed")
        assert write_parts(numbers(250, size), tmp_path, part_rows=100) == 250
        contents.append({file.name: file.read_bytes() for file in tmp_path.iterdir()})
    assert contents[0] == contents[1] == contents[2]
    parts = sorted(tmp_path.iterdir())
    assert [file.name for file in parts] == [f"part-0000{number}.parquet" for number in range(3)]
    assert [pq.read_metadata(file).num_rows for file in parts] == [100, 100, 50]
    assert pq.read_table(parts)["url"].to_pylist() == [str(number) for number in range(250)]
    assert write_parts(numbers(200, 50), tmp_path, part_rows=100) == 200
    assert len(list(tmp_path.iterdir())) == 2


# Hosts.


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST",
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f.1",
        "10.1.2.3",
        "192.168.0.1",
        "[::1]",
        "printer.local",
        "localhost.",
        "intranet",
        "[64:ff9b::7f00:1]",
        "[fe80::1%25eth0]",
        "192.0.0.192",
    ],
)
def test_private_hosts_are_dropped_unless_wanted(host: str) -> None:
    assert url_fault(f"http://{host}/1.jpg", private_hosts=False) == "private_host"
    assert url_fault(f"http://{host}:80/1.jpg", private_hosts=True) is None


@pytest.mark.parametrize(
    "host", ["example.com", "8.8.8.8", "xn--bcher-kva.example", "[2606:4700::1111]", "10.example.com"]
)
def test_public_hosts_stay(host: str) -> None:
    assert url_fault(f"https://{host}/1.jpg", private_hosts=False) is None


@pytest.mark.parametrize(
    "url", ["http://", "http:///x.jpg", "//example.com/x.jpg", "http://[::1", "http://a:b/x.jpg", "x.jpg"]
)
def test_no_urls(url: str) -> None:
    assert url_fault(url, private_hosts=True) == "not_http"


@pytest.mark.parametrize(
    ("name", "content", "changes", "message"),
    [
        ("absent.parquet", None, {}, "there is no file absent.parquet: set source.location"),
        ("t.xlsx", b"x", {}, "cannot tell what t.xlsx is: name it .parquet, .csv, .tsv, .jsonl or .json"),
        ("t.parquet", b"not parquet at all", {}, "cannot read the table t.parquet: "),
        ("t.parquet", b"", {}, "cannot read the table t.parquet: "),
        ("t.csv", b"", {}, "cannot read the table t.csv: "),
        ("t.csv", b"url,caption\nhttps://example.com/1.jpg,a,b\n", {}, "cannot read the table t.csv: "),
        ("t.jsonl", b'{"url": "https://a.com", "cap', {}, "cannot read the table t.jsonl: "),
        (
            "t.csv",
            b"URL,TEXT\nhttps://example.com/1.jpg,a\n",
            {},
            "t.csv has no column 'url' (it has URL, TEXT): set url_column",
        ),
        ("t.csv", b"url,caption\nhttps://a.com/1.jpg,a\n", {"score_columns": ["q"]}, "t.csv has no column 'q'"),
        ("t.csv", b"url,caption\nhttps://a.com/1.jpg,a\n", {"carry": ["licence"]}, "t.csv has no column 'licence'"),
        (
            "t.csv",
            b"url,caption\nhttps://a.com/1.jpg,a\n",
            {"where": {"Q": {"at_least": 1}}},
            "t.csv has no column 'Q'",
        ),
        (
            "t.jsonl",
            b'{"url": "https://a.com/1.jpg", "text": "a"}\n',
            {},
            "t.jsonl has no column 'caption' (it has url, text): set url_column",
        ),
        (
            "t.jsonl",
            b'{"url": "https://a.com/1.jpg", "caption": "a"}\nno json\n',
            {},
            "cannot read the table t.jsonl: ",
        ),
        ("t.csv", b'url,caption\nhttps://a.com/1.jpg,"a\n', {}, "cannot read the table t.csv: "),
        ("t.csv", b"url,caption\nhttps://a.com/1.jpg,\xff\n", {}, "cannot read the table t.csv: "),
        (
            "t.csv",
            b"url,caption,q\nhttps://a.com/1.jpg,a,b\n",
            {"score_columns": ["q"]},
            "cannot read the table t.csv: conversion from `str` to `f64` failed in column 'q' for 1 out of 1 values: [\"b\"]",
        ),
        (
            "t.jsonl",
            b'{"url": "ftp://a.com/1.jpg", "caption": "a"}\n',
            {},
            "t.jsonl holds no usable row (dropped: {'not_http': 1})",
        ),
    ],
)
def test_a_bad_table_is_one_line(
    out: Path, recorder: Any, name: str, content: bytes | None, changes: dict[str, Any], message: str
) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(KoalaError) as caught:
        make(out, recorder, kind="file", location=name, **changes)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not list(out.glob("*.parquet"))
    assert not list(out.glob("*.json"))


def test_numbers_are_no_urls(out: Path, recorder: Any) -> None:
    write(Path("t.parquet"), [{"url": 1, "caption": "a"}])
    with pytest.raises(KoalaError, match=r"t.parquet: column 'url' holds Int64, not text"):
        make(out, recorder, kind="file", location="t.parquet")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"score_columns": ["width"]}, "img2dataset keeps the name 'width'"),
        ({"carry": ["sha256"]}, "img2dataset keeps the name 'sha256'"),
        ({"carry": ["q"], "score_columns": ["q"]}, "score_columns and carry name 'q' twice"),
        ({"where": {"q": {}}}, "give at_least, at_most or both"),
        ({"where": {"q": {"least": 1}}}, "Extra inputs"),
        ({"columns": ["url", "text"]}, r"there is no column 'caption' among columns \(url, text\)"),
        ({"revision": "main"}, "'revision' is for kind 'hub'"),
        ({"preset": "laion"}, "Input should be 'laion-aesthetics', "),
    ],
)
def test_what_cannot_be_is_said_when_params_are_read(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TableSource(kind="file", location="t.csv", **values)


def test_a_preset_fills_in_what_is_left_out() -> None:
    at_hub = TableSource(kind="hub", preset="coyo-700m", revision="main", caption_column="mine")
    assert (at_hub.location, at_hub.files) == ("kakaobrain/coyo-700m", ("data/*.parquet",))
    assert (at_hub.url_column, at_hub.caption_column) == ("url", "mine")
    own = TableSource(kind="file", preset="laion-aesthetics", location="my-copy")
    assert (own.location, own.files, own.url_column, own.caption_column) == ("my-copy", (), "URL", "TEXT")
    with pytest.raises(ValidationError, match="pinned 'revision'"):
        TableSource(kind="hub", preset="datacomp")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_source(preset: Preset) -> None:
    config = TableSource(kind="hub", preset=preset, revision="main")
    assert config.files
    assert format_of(config.files[0].replace("*", "x"))


# S3 and the Hub: servers on loopback.


@pytest.fixture
def s3(s3_server: tuple[str, int]) -> str:
    boto3.client("s3").create_bucket(Bucket="lists")
    return "lists"


def test_tables_from_s3(out: Path, recorder: Any, s3: str, forget_credentials: Callable[[], None]) -> None:
    client = boto3.client("s3")
    for name in ("a.parquet", "b.jsonl"):
        client.upload_file(str(write(Path(name), urls(*name))), s3, f"some/folder/{name}")
    client.put_object(Bucket=s3, Key="some/folder/README.md", Body=b"no table")
    config = {"kind": "s3", "location": f"s3://{s3}/some/folder", "files": ["b.jsonl", "a.parquet"]} | COLUMNS
    captions = make(out, recorder, **config)["caption"].to_pylist()
    assert captions == ["number b", "number .", "number j", *captions[3:]]
    assert "number q" in captions
    for location in ("some/folder/", "some/folder/*.parquet", "some/*/a.parquet", "some/folder/a.parquet"):
        assert (
            make(out, recorder, kind="s3", location=f"s3://{s3}/{location}", **COLUMNS)["caption"][0].as_py()
            == "number a"
        )
    with pytest.raises(KoalaError, match=r"^s3://lists/some/\*.csv has no file"):
        make(out, recorder, kind="s3", location="s3://lists/some/*.csv")

    for location in ("lists/a.parquet", "s3://lists", "https://lists/a.parquet"):
        with pytest.raises(KoalaError, match="write it as s3://bucket/key"):
            make(out, recorder, kind="s3", location=location)
    for location in ("s3://lists/absent.parquet", "s3://nobodys/a.parquet"):
        with pytest.raises(KoalaError, match=f"^cannot fetch {location} from S3: "):
            make(out, recorder, kind="s3", location=location)

    forget_credentials()
    with pytest.raises(KoalaError, match="no credentials for S3: set AWS_ACCESS_KEY_ID"):
        make(out, recorder, kind="s3", location="s3://lists/some/folder/a.parquet")


class _BreaksOff(BaseHTTPRequestHandler):
    """An S3 server that breaks off in the middle of an object, the first times that it is asked for."""

    protocol_version = "HTTP/1.1"
    content = b"url,caption\n" + b"https://example.com/1.jpg,a picture\n" * 1000
    times = 0

    def do_HEAD(self) -> None:
        self.send_response(200)
        for name, value in (("ETag", '"x"'), ("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self) -> None:
        type(self).times -= 1
        self.do_HEAD()
        self.wfile.write(self.content[: 5000 if self.times >= 0 else None])
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("times", [2, 1000])
@pytest.mark.usefixtures("s3_server")
def test_an_object_that_breaks_off_is_fetched_again_or_said(
    out: Path, recorder: Any, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_BreaksOff, "times", times)
    with ThreadingHTTPServer(("127.0.0.1", 0), _BreaksOff) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        ends = (
            does_not_raise()
            if times == 2
            else pytest.raises(KoalaError, match=r"^cannot fetch s3://lists/a.csv from S3: ")
        )
        with ends:
            make(out, recorder, kind="s3", location="s3://lists/a.csv")
        server.shutdown()
    assert any(out.iterdir()) == (times == 2)


REVISION = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub as hf_hub_download asks for: one data set of one file, one that is gated, and no other."""

    content = b""
    listing = json.dumps(
        [{"type": "file", "path": path, "size": 1, "oid": "1"} for path in ("part/t.jsonl", "README.md")]
    ).encode()

    def do_GET(self) -> None:
        code, error = 404, "RepoNotFound"
        if self.path.startswith("/datasets/us/gated/"):
            code, error = 403, "GatedRepo"
        elif self.path.startswith("/api/datasets/us/list/tree/"):
            return self.answer(self.listing)
        elif self.path.startswith("/datasets/us/list/"):
            wanted = self.path.removeprefix("/datasets/us/list/resolve/")
            error = "EntryNotFound" if wanted.startswith(REVISION) else "RevisionNotFound"
            code = 200 if wanted == f"{REVISION}/part/t.jsonl" else 404
        self.send_response(code)
        if code == 200:
            self.send_header("ETag", '"1234"')
            self.send_header("X-Repo-Commit", REVISION)
            self.send_header("Content-Length", str(len(self.content)))
        else:
            self.send_header("X-Error-Code", error)
            self.send_header("Content-Length", "0")
        self.end_headers()
        if code == 200 and self.command == "GET":
            self.wfile.write(self.content)

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_hub: Callable[[type[_Hub]], None]) -> None:
    from huggingface_hub import constants

    _Hub.content = write(tmp_path / "made.jsonl").read_bytes()
    as_hub(_Hub)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def hub_config(repo: str = "us/list", file: str = "part/t.jsonl", revision: str = REVISION) -> dict[str, Any]:
    return {"kind": "hub", "location": repo, "files": [file], "revision": revision} | COLUMNS


def test_a_table_from_the_hub(out: Path, recorder: Any, hub: None) -> None:
    assert make(out, recorder, **hub_config()).num_rows == 3
    assert make(out, recorder, **hub_config(file="part/*.jsonl")).num_rows == 3
    with pytest.raises(KoalaError, match=r"^the data set us/list has no file \*.csv: set source.files"):
        make(out, recorder, **hub_config(file="*.csv"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repo": "us/nothing"}, "the Hub has no data set us/nothing, or it is private"),
        ({"repo": "us/gated"}, "the data set us/gated is gated: accept its terms on the Hub and set HF_TOKEN"),
        ({"revision": "f" * 40}, "the data set us/list has no revision ffff"),
        ({"file": "other.csv"}, "the data set us/list has no file other.csv at 0123"),
        ({"repo": "not/a/name"}, "cannot fetch part/t.jsonl of not/a/name from the Hub: "),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    out: Path, recorder: Any, hub: None, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(KoalaError) as caught:
        make(out, recorder, **hub_config(**changes))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_no_way_to_the_hub_is_one_line(out: Path, recorder: Any, hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(KoalaError, match="cannot reach the Hub for us/list/part/t"):
        make(out, recorder, **hub_config())


def test_the_hub_needs_a_pinned_revision() -> None:
    with pytest.raises(ValidationError, match="pinned 'revision'"):
        TableSource(kind="hub", location="us/list", files=("t.csv",))
