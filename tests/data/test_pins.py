"""Pins of source lists, and `koala data update`, which moves them: on disk, on an S3 server, on a stand-in for the Hub."""

import json
import os
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import boto3
import pytest

from koala.data import pins
from koala.data.source import source
from koala.data.table_files import located
from koala.data.tables import TableSource
from koala.data.update import update
from koala.errors import KoalaError

NOTHING = Path("nothing")


def write(name: str, *numbers: int) -> Path:
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("url,caption\n" + "".join(f"https://example.com/{number}.jpg,a picture\n" for number in numbers))
    return file


def pinned(config: TableSource) -> TableSource:
    """The configuration as params.yaml's profile `mine` gives it."""
    return config.model_copy(update={"pin": pins.read().get("mine")})


def make(config: TableSource, out: Path, recorder: Any) -> None:
    out.mkdir(exist_ok=True)
    source(pinned(config), out=out, run=recorder)


def test_a_changed_file_is_refused_until_its_pin_is_moved(
    out: Path, recorder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TableSource(kind="file", location="lists")
    write("lists/a.csv", 1, 2, 3)
    make(config, out, recorder)  # without a pin, as ever
    update("mine", config, NOTHING)
    first = pins.read()["mine"]
    assert capsys.readouterr().out == "mine: lists is pinned: 1 files, 3 usable rows\n"
    make(config, out, recorder)
    assert pinned(config).recipe()["pin"] == first.digest

    write("lists/a.csv", 2, 3, 4, 5)
    with pytest.raises(
        KoalaError, match=r"^lists is not what source.lock.yaml pins \(a.csv changed\): run `koala data"
    ):
        make(config, Path("refused"), recorder)
    update("mine", pinned(config), out)
    second = pins.read()["mine"]
    assert capsys.readouterr().out.splitlines() == [
        f"mine: a.csv: {first.files['a.csv']} -> {second.files['a.csv']}",
        "mine: usable rows 3 -> 4",
        "mine: 2 rows added and 1 removed, by URL, beside the table in out",
    ]
    assert second.digest != first.digest
    make(config, out, recorder)

    before = pins.FILE.read_bytes()
    update("mine", pinned(config), out)
    assert capsys.readouterr().out == "mine: lists is what the pin says: 4 usable rows\n"
    assert pins.FILE.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda: write("lists/b.csv", 9), "b.csv is new"),
        (lambda: Path("lists/a.csv").rename("lists/0.csv"), "a.csv is gone"),
    ],
)
def test_files_that_come_and_go_are_noticed(out: Path, recorder: Any, change: Callable[[], Any], what: str) -> None:
    config = TableSource(kind="file", location="lists")
    write("lists/a.csv", 1)
    update("mine", config, NOTHING)
    change()
    with pytest.raises(KoalaError, match=rf"pins \({what}\)"):
        make(config, out, recorder)
    write("other/a.csv", 1)
    with pytest.raises(KoalaError, match=r"^other is not what .* \(the pin is of lists\)"):
        make(TableSource(kind="file", location="other"), out, recorder)


def test_nothing_usable_is_not_pinned(out: Path) -> None:
    Path("t.csv").write_text("url,caption\nftp://example.com/1.jpg,a\n")
    with pytest.raises(
        KoalaError, match=r"^t.csv holds no usable row \(dropped: \{'not_http': 1\}\): nothing is pinned"
    ):
        update("mine", TableSource(kind="file", location="t.csv"), NOTHING)
    assert not pins.FILE.exists()


def test_pins_of_profiles_stand_side_by_side_and_a_damaged_file_is_said(out: Path) -> None:
    for profile in ("b", "a"):
        update(profile, TableSource(kind="file", location=str(write(f"{profile}.csv", 1))), NOTHING)
    assert list(pins.read()) == ["a", "b"]
    pins.FILE.write_text("a: {location: x}\n")
    with pytest.raises(KoalaError, match=r"^source.lock.yaml is damaged: restore it from git"):
        pins.read()


def test_an_s3_object_is_pinned_by_etag_and_version(out: Path, recorder: Any, s3_server: tuple[str, int]) -> None:
    client = boto3.client("s3")
    client.create_bucket(Bucket="lists")
    config = TableSource(kind="s3", location="s3://lists/a.csv")
    client.upload_file(str(write("a.csv", 1)), "lists", "a.csv")
    update("mine", config, NOTHING)
    assert pins.read()["mine"].files["a.csv"].startswith("etag:")
    make(config, out, recorder)
    client.upload_file(str(write("a.csv", 2)), "lists", "a.csv")
    with pytest.raises(KoalaError, match=r"^s3://lists/a.csv is not what .* \(a.csv changed\)"):
        make(config, out, recorder)

    client.put_bucket_versioning(Bucket="lists", VersioningConfiguration={"Status": "Enabled"})
    client.upload_file(str(write("a.csv", 2)), "lists", "a.csv")
    update("mine", pinned(config), NOTHING)
    assert " version:" in pins.read()["mine"].files["a.csv"]
    make(config, out, recorder)
    files = located(pinned(config))
    files.check_pin(pinned(config))
    client.upload_file(str(write("a.csv", 3)), "lists", "a.csv")  # after it was looked at
    with files.fetched("a.csv") as file:
        assert file.read_text() == write("b.csv", 2).read_text()


@pytest.mark.parametrize("server", ["s3_server", "strict_bucket"])
def test_an_object_that_is_replaced_after_the_look_is_refused(
    out: Path, server: str, request: pytest.FixtureRequest
) -> None:
    """In a bucket without versions."""
    request.getfixturevalue(server)
    client = boto3.client("s3")
    client.create_bucket(Bucket="lists")
    config = TableSource(kind="s3", location="s3://lists/some", files=("a.csv",))
    client.upload_file(str(write("a.csv", 1)), "lists", "some/a.csv")
    update("mine", config, NOTHING)
    files = located(pinned(config))
    files.check_pin(pinned(config))
    with files.fetched("a.csv") as file:
        assert file.read_text() == Path("a.csv").read_text()
    client.upload_file(str(write("b.csv", 2)), "lists", "some/a.csv")
    with (
        pytest.raises(KoalaError, match=r"^s3://lists/some changed while it was read \(a.csv\): run this again "),
        files.fetched("a.csv"),
    ):
        pass


def written_over() -> None:
    """Other content of the same length, with the time of before."""
    before = os.stat("a.csv")
    write("a.csv", 1, 3)
    os.utime("a.csv", ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = [lambda: os.replace(write("b.csv", 1, 3), "a.csv"), lambda: write("a.csv", 1), lambda: os.remove("a.csv")]


@pytest.mark.parametrize(
    ("is_pinned", "change"), [(True, written_over), *((pin, change) for pin in (False, True) for change in CHANGES)]
)
def test_a_file_that_changes_while_it_is_read_is_refused(out: Path, is_pinned: bool, change: Callable[[], Any]) -> None:
    config = TableSource(kind="file", location=str(write("a.csv", 1, 2)))
    if is_pinned:
        update("mine", config, NOTHING)
    assert sum(map(len, pinned(config).tables(Counter()))) == 2
    tables = pinned(config).tables(Counter())
    next(tables)
    change()
    with pytest.raises(KoalaError, match=r"^a.csv changed while it was read \(a.csv\): run this again "):
        next(tables)


@pytest.mark.parametrize("moment", ["before", "while"])
def test_a_list_that_changes_while_it_is_counted_is_not_pinned(
    out: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Also where it is again as it was once it is counted."""
    config = TableSource(kind="file", location=str(write("a.csv", 1, 2)))
    tables = TableSource.tables

    def slowly(self: TableSource, dropped: Any) -> Any:
        if moment == "before":
            write("a.csv", 1, 3)
        for table in tables(self, dropped):
            if moment == "while":
                write("a.csv", 1, 3)
            yield table
        write("a.csv", 1, 2)

    monkeypatch.setattr(TableSource, "tables", slowly)
    with pytest.raises(KoalaError, match=r"^a.csv changed while it was read: run `koala data update` again"):
        update("mine", config, NOTHING)
    assert not pins.read()


class _Hub(BaseHTTPRequestHandler):
    """A data set of one file, whose branch `main` stands at `commit`."""

    commit = "a" * 40
    lists: dict[str, bytes] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        if self.path.startswith("/api/datasets/us/list/revision/"):
            return self.answer(json.dumps({"id": "us/list", "sha": self.commit}).encode())
        revision = self.path.split("/")[5]
        commit = self.commit if revision == "main" else revision
        return self.answer(self.lists[commit], commit)

    def answer(self, body: bytes, revision: str = "") -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{revision}"')
        self.send_header("X-Repo-Commit", revision)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_branch_of_the_hub_is_pinned_at_its_commit(
    out: Path,
    recorder: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    as_hub: Callable[[type[BaseHTTPRequestHandler]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from huggingface_hub import constants

    as_hub(_Hub)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    one, other = "a" * 40, "b" * 40
    _Hub.lists = {one: write("a.csv", 1, 2).read_bytes(), other: write("a.csv", 2, 3, 4).read_bytes()}
    _Hub.commit = one
    config = TableSource(kind="hub", location="us/list", files=("a.csv",), revision="main")
    update("mine", config, NOTHING)
    _Hub.commit = other
    make(config, out, recorder)  # the branch moved, the pin did not
    assert recorder.logged["rows"] == 2
    capsys.readouterr()
    update("mine", pinned(config), out)
    assert capsys.readouterr().out.splitlines() == [
        f"mine: commit {one} -> {other}",
        "mine: usable rows 2 -> 3",
        "mine: 2 rows added and 1 removed, by URL, beside the table in out",
    ]
    make(config, out, recorder)
    assert recorder.logged["rows"] == 3


def test_all_files_of_a_branch_are_of_one_commit(
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    as_hub: Callable[[type[BaseHTTPRequestHandler]], None],
) -> None:
    """Also where it moves while they are fetched, and nothing pins it."""
    from huggingface_hub import constants

    as_hub(_Hub)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    one, other = "a" * 40, "b" * 40
    _Hub.lists = {one: write("a.csv", 1, 2).read_bytes(), other: write("a.csv", 3).read_bytes()}
    _Hub.commit = one
    files = located(TableSource(kind="hub", location="us/list", files=("a.csv", "deep/b.csv"), revision="main"))
    contents = []
    for name in files.names:
        with files.fetched(name) as file:
            contents.append(file.read_bytes())
        _Hub.commit = other
    assert contents == [_Hub.lists[one]] * 2
