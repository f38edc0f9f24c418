"""Lists from S3 and the Hub: servers on loopback."""

import json
import threading
from collections.abc import Callable
from contextlib import nullcontext as does_not_raise
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from data.lists import COLUMNS, make, urls, write
from pydantic import ValidationError

from koala.data.tables import TableSource
from koala.errors import KoalaError


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
