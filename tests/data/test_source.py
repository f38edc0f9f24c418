import gzip
import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from koala.data.source import source
from koala.data.tables import TableSource, row_fault
from koala.errors import KoalaError


def make(out: Path, recorder: Any, **config: Any) -> pa.Table:
    """Run the stage; its table."""
    source(TableSource(**config), out=out, run=recorder)
    return pq.read_table(out / "table.parquet")


# Tables from disk.

ROWS: list[dict[str, Any]] = [
    {"link": "https://example.com/1.jpg", "text": "a horse", "aesthetic": 5, "extra": "x"},
    {"link": None, "text": "no url", "aesthetic": 5, "extra": "x"},
    {"link": "https://example.com/2.jpg", "text": None, "aesthetic": 5, "extra": "x"},
    {"link": "https://example.com/3.jpg", "text": "  ", "aesthetic": 5, "extra": "x"},
    {"link": "file:///etc/passwd", "text": "a file of mine", "aesthetic": 5, "extra": "x"},
    {"link": "ftp://example.com/4.jpg", "text": "an old server", "aesthetic": 5, "extra": "x"},
    {"link": "http://169.254.169.254/latest/meta-data", "text": "a cloud's secrets", "aesthetic": 5, "extra": "x"},
    {"link": "http://example.com:8080/5.jpg", "text": "a zebra", "aesthetic": None, "extra": "x"},
    {"link": "http://example.com/6.jpg", "text": "an ass", "aesthetic": 6.5, "extra": "x"},
]


def write(file: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    table = pa.Table.from_pylist(rows)
    name = file.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(table, file)
        return file
    if name.endswith(".csv"):
        sink = pa.BufferOutputStream()
        pa.csv.write_csv(table, sink)
        content = sink.getvalue().to_pybytes()
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


COLUMNS = {"url_column": "link", "caption_column": "text", "score_columns": ["aesthetic"]}


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.csv.gz", "t.jsonl", "t.jsonl.gz"])
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
        "dropped": {"no_caption": 2, "no_url": 1, "not_http": 2, "private_host": 1},
    }


def test_several_files_up_to_a_number_of_rows(out: Path, recorder: Any) -> None:
    folder = Path("tables")
    folder.mkdir()
    write(folder / "b.csv")
    write(folder / "a.parquet")
    (folder / "never.csv").write_text("this is not read: enough rows came before")
    config = {"kind": "file", "location": "tables", "files": ["b.csv", "a.parquet", "never.csv"], "rows": 5} | COLUMNS
    urls = make(out, recorder, **config)["url"].to_pylist()
    assert [url[-5] for url in urls] == ["1", "5", "6", "1", "5"]


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
    ],
)
def test_private_hosts_are_dropped_unless_wanted(host: str) -> None:
    assert row_fault(f"http://{host}/1.jpg", "a caption", private_hosts=False) == "private_host"
    assert row_fault(f"http://{host}:80/1.jpg", "a caption", private_hosts=True) is None


@pytest.mark.parametrize(
    "host", ["example.com", "8.8.8.8", "xn--bcher-kva.example", "[2606:4700::1111]", "10.example.com"]
)
def test_public_hosts_stay(host: str) -> None:
    assert row_fault(f"https://{host}/1.jpg", "a caption", private_hosts=False) is None


@pytest.mark.parametrize(
    "url", ["http://", "http:///x.jpg", "//example.com/x.jpg", "http://[::1", "http://a:b/x.jpg", "x.jpg"]
)
def test_no_urls(url: str) -> None:
    assert row_fault(url, "a caption", private_hosts=True) == "not_http"


@pytest.mark.parametrize(
    ("name", "content", "changes", "message"),
    [
        ("absent.parquet", None, {}, "there is no file absent.parquet: set source.location"),
        ("t.xlsx", b"x", {}, "cannot tell what t.xlsx is: name it .parquet, .csv or .jsonl"),
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
        (
            "t.csv",
            b"url,caption,q\nhttps://a.com/1.jpg,a,b\n",
            {"score_columns": ["q"]},
            "column 'q' holds string, not numbers",
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
    with pytest.raises(KoalaError, match="column 'url' holds int64, not text"):
        make(out, recorder, kind="file", location="t.parquet")


def test_names_that_img2dataset_takes_are_refused() -> None:
    with pytest.raises(ValidationError, match="keeps the name 'width'"):
        TableSource(kind="file", location="t.csv", score_columns=("width",))


# S3 and the Hub: servers on loopback.


@pytest.fixture
def s3(s3_server: tuple[str, int]) -> str:
    boto3.client("s3").create_bucket(Bucket="lists")
    return "lists"


def test_tables_from_s3(out: Path, recorder: Any, s3: str, forget_credentials: Callable[[], None]) -> None:
    client = boto3.client("s3")
    for name in ("a.parquet", "b.jsonl"):
        client.upload_file(str(write(Path(name))), s3, f"some/folder/{name}")
    config = {"kind": "s3", "location": f"s3://{s3}/some/folder", "files": ["b.jsonl", "a.parquet"]} | COLUMNS
    assert make(out, recorder, **config).num_rows == 6
    assert make(out, recorder, kind="s3", location=f"s3://{s3}/some/folder/a.parquet", **COLUMNS).num_rows == 3

    for location in ("lists/a.parquet", "s3://lists", "https://lists/a.parquet"):
        with pytest.raises(KoalaError, match="write it as s3://bucket/key"):
            make(out, recorder, kind="s3", location=location)
    for location in ("s3://lists/absent.parquet", "s3://nobodys/a.parquet"):
        with pytest.raises(KoalaError, match=f"^cannot fetch {location} from S3: "):
            make(out, recorder, kind="s3", location=location)

    forget_credentials()
    with pytest.raises(KoalaError, match="no credentials for S3: set AWS_ACCESS_KEY_ID"):
        make(out, recorder, kind="s3", location="s3://lists/some/folder/a.parquet")


REVISION = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub as hf_hub_download asks for: one data set of one file, one that is gated, and no other."""

    content = b""

    def do_GET(self) -> None:
        code, error = 404, "RepoNotFound"
        if self.path.startswith("/datasets/us/gated/"):
            code, error = 403, "GatedRepo"
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
