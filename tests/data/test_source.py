import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from data.lists import COLUMNS, ROWS, dropped, make, urls, write
from pydantic import ValidationError

from koala.data import rows, table_reader
from koala.data import source as stage
from koala.data.presets import PRESETS, Preset
from koala.data.rows import Seen, url_fault
from koala.data.source import write_parts
from koala.data.table_files import format_of
from koala.data.tables import TableSource
from koala.errors import KoalaError

# Tables from disk.


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
