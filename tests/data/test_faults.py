"""Faults of what comes from outside, many of a kind: each is one line that names it, or a cause that is counted."""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from koala.data import manifest
from koala.data.config import DownloadConfig, FilterConfig, Quota
from koala.data.decode import DecodeConfig, UnusableError, normalised
from koala.data.download import _parts, download
from koala.data.fetch import quoted, retry_after
from koala.data.filter import filter as stage
from koala.data.forget import Forgotten, read, read_hashes
from koala.data.judge import Scores
from koala.data.rules.scores import Scores as ScoreRule
from koala.data.shards import Sample, ShardWriter, read_shard
from koala.data.tables import TableSource
from koala.data.update import _read
from koala.data.whereabouts import whereabouts
from koala.errors import KoalaError
from koala.run import NoRun

SIXTY = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    "url",
    [
        "",
        " ",
        "a.jpg",
        "/a.jpg",
        "//example.com/a.jpg",
        "http:",
        "http://",
        "http:///a.jpg",
        "http:/example.com/a.jpg",
        "https://:443/a.jpg",
        "http://example.com:port/a.jpg",
        "http://example.com:99999/a.jpg",
        "http://example.com:-1/a.jpg",
        "http://[::1/a.jpg",
        "http://[example.com]/a.jpg",
        "http://exam\x00ple.com/a.jpg",
        "http://example.com/a\r\nHost: other",
        "http://example.com/a\x7f.jpg",
        "http://" + "a" * 64 + ".com/a.jpg",
        "http://a..com/a.jpg",
        "ftp://example.com/a.jpg",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "javascript:alert(1)",
        "s3://bucket/a.jpg",
        "gopher://example.com/",
        "blob:https://example.com/1",
    ],
)
def test_what_is_no_web_address_is_not_asked(url: str) -> None:
    assert quoted(url) is None


@pytest.mark.parametrize(
    "value", ["", " ", "soon", "-5", "1.5", "Wed, 99 Foo 2026 00:00:00 GMT", "3 days", "9" * 3 + "s", "\x00"]
)
def test_a_pause_that_is_none_is_not_kept(value: str) -> None:
    assert retry_after(value) is None


def encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    image = Image.effect_noise((40, 30), 60).convert("P" if kind == "GIF" else "RGB")
    image.save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP"])
@pytest.mark.parametrize(
    "broken",
    [
        lambda data: data[:1],
        lambda data: data[:11],
        lambda data: data[:20],
        lambda data: b"\x01" + data[1:],
        lambda data: b"\n" + data,
        lambda data: b"\x00" * len(data),
    ],
    ids=["one byte", "eleven", "twenty", "other magic", "a line before", "zeros"],
)
def test_a_broken_image_is_a_cause(kind: str, broken: Callable[[bytes], bytes]) -> None:
    with pytest.raises(UnusableError, match=r"no image|cannot be decoded"):
        normalised(broken(encoded(kind)), DecodeConfig())


def tar_of(file: Path, members: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content) if kind == tarfile.REGTYPE else 0
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
)
def test_a_member_that_is_no_file_is_no_sample(kind: bytes, tmp_path: Path) -> None:
    tar_of(tmp_path / "x.tar", {"1.jpg": b"", "1.txt": b""}, kind)
    assert list(read_shard(tmp_path / "x.tar")) == []


@pytest.mark.parametrize(
    "members",
    [
        {"1.txt": b"a caption alone"},
        {"1.json": b"{}"},
        {".jpg": b"x"},
        {"1": b"x"},
        {"1.exe": b"x", "1.txt": b"x"},
        {"1.tiff": b"x"},
        {"": b"x"},
    ],
    ids=["caption", "metadata", "hidden", "no extension", "program", "other format", "no name"],
)
def test_members_without_an_image_are_no_sample(members: dict, tmp_path: Path) -> None:
    tar_of(tmp_path / "x.tar", members)
    assert list(read_shard(tmp_path / "x.tar")) == []


@pytest.mark.parametrize("again", ["1.jpg", "1.JPG", "1.txt"])
def test_a_name_that_comes_twice_is_said(again: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("1.jpg", "1.txt", again):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(KoalaError, match=rf"x.tar holds '{again}' twice"):
        list(read_shard(tmp_path / "x.tar"))


def test_names_that_lead_out_of_the_folder_write_nothing(tmp_path: Path) -> None:
    tar_of(tmp_path / "x.tar", {"../../out.jpg": b"x", "/tmp/out2.jpg": b"y"})
    assert len(list(read_shard(tmp_path / "x.tar"))) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["x.tar"]


@pytest.mark.parametrize(
    "meta", [b"[1]", b"1", b'"x"', b"null", b"{", b"{'a': 1}", b"\xff\xfe", b"[" * 100_000, b'{"a":}']
)
def test_metadata_that_are_no_object_name_their_sample(meta: bytes, tmp_path: Path) -> None:
    tar_of(tmp_path / "x.tar", {"1.jpg": b"x", "1.json": meta})
    with pytest.raises(KoalaError, match="metadata of 1 are no JSON object"):
        list(read_shard(tmp_path / "x.tar"))


@pytest.mark.parametrize(
    "meta",
    [
        b'{"url": "http://[example/x.png"}',
        b'{"url": "http://a\\ud800.example/x.png"}',
        b'{"url": 5}',
        b'{"license": "\\ud800"}',
        b'{"license": ["a", {}]}',
        b'{"original_width": -3, "original_height": "x"}',
        b'{"original_width": 1e400, "original_height": 7}',
        b'{"original_width": 1' + b"0" * 30 + b', "original_height": 7}',
        b'{"aesthetic": "high"}',
        b'{"aesthetic": NaN}',
        b'{"aesthetic": 1' + b"0" * 400 + b"}",
        b'{"sha256": 5}',
        b'{"sha256": "zz"}',
    ],
)
def test_metadata_of_any_values_stop_nothing(meta: bytes, tmp_path: Path) -> None:
    images, scores, out = (tmp_path / name for name in ("images", "scores", "out"))
    for folder in (images, scores, out):
        folder.mkdir()
    good = b'{"url": "https://example.com/2.png", "license": "by", "aesthetic": 5}'
    members = {"1.png": encoded("PNG"), "1.json": meta, "2.png": encoded("WEBP"), "2.json": good}
    tar_of(images / "00000.tar", members)
    quotas = Quota(by="host", at_most=1), Quota(by="license", at_most=1, best="aesthetic")
    stage(FilterConfig(rules=(ScoreRule(at_least={"aesthetic": 1}),), quotas=quotas), images, scores, out, NoRun())
    first, second = pq.read_table(out / "verdicts/00000.parquet").to_pylist()
    assert (first["rule"], second["rule"]) == ("score.aesthetic", None)
    assert (first["original_width"], first["original_height"]) == Image.open(io.BytesIO(encoded("PNG"))).size


@pytest.mark.parametrize(
    "text",
    [
        "- url: https://example.com/a.jpg\n  on: 2026-01-01\n",
        "- {because: x, on: 2026-01-01}\n",
        f"- {{url: x, sha256: {SIXTY}, because: x, on: 2026-01-01}}\n",
        "- {sha256: abc, because: x, on: 2026-01-01}\n",
        "- {dhash: 0123, because: x, on: 2026-01-01}\n",
        "- {dhash: 0123456789abcdef, bits: 17, because: x, on: 2026-01-01}\n",
        "- {url: x, because: x, on: someday}\n",
        "- {url: x, because: x, on: 2026-01-01, also: 1}\n",
        "url: x\n",
        "- [\n",
        "just words\n",
        "- !!python/object/apply:os.system [touch owned]\n",
        "\xff",
    ],
)
def test_a_broken_list_of_takedowns_is_one_line(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A takedown that cannot be read is never passed over."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "forget.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(KoalaError, match=r"forget\.yaml does not hold takedowns") as raised:
        read(file)
    assert "\n" not in str(raised.value)
    assert not Path("owned").exists()


@pytest.mark.parametrize("line", ["abc", SIXTY[:-2], SIXTY + "00", "x" * 64, "0123456789abcde", SIXTY + ",x"])
def test_a_broken_line_of_a_hash_list_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "hashes.txt"
    file.write_text(f"{SIXTY}\n# a comment\n{line}\n")
    with pytest.raises(KoalaError, match=r"hashes.txt, line 3"):
        read_hashes((str(file),))


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_hash_list_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "hashes.txt"
    if content:
        file.write_bytes(content)
    with pytest.raises(KoalaError, match=r"hashes.txt cannot be read"):
        read_hashes((str(file),))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"files": 1}', b'{"files": {"a": 1}}'])
def test_a_broken_manifest_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x")
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(KoalaError, match=r"manifest\.json is broken"):
        manifest.check(tmp_path)


# A table in place of which something else stands. (Lists: tests/data/test_source.py.)


def table_of(file: Path, fault: str) -> None:
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"url": ["https://example.com/a.jpg"] * 2_000, "caption": ["x"] * 2_000}), file)
    if fault == "truncated":
        os.truncate(file, 900)
    elif fault == "a few bytes":
        os.truncate(file, 20)
    elif fault == "a page":
        file.write_text("<html>" * 100)
    elif fault == "other columns":
        pq.write_table(pa.table({"a": [1]}), file)
    elif fault == "a folder":
        file.unlink()
        file.mkdir()


def of_download(folder: Path) -> None:
    download(DownloadConfig(image_size=32), folder, Path("out"), NoRun())


def of_whereabouts(folder: Path) -> None:
    whereabouts(Forgotten(url="https://example.com/b.jpg", because="x", on=date(2026, 1, 1)), folder, Path(), Path())


def of_update(folder: Path) -> None:
    list(_read(sorted(folder.glob("*.parquet"))))


def of_scores(folder: Path) -> None:
    Scores.read(folder / "part-00000.parquet")


@pytest.mark.parametrize(
    ("reader", "fault"),
    [
        (reader, fault)
        for reader in (of_download, of_whereabouts, of_update, of_scores)
        for fault in ("truncated", "a few bytes", "a page", "other columns", "a folder")
        if (reader, fault) != (of_whereabouts, "other columns")  # an artifact of other columns knows no sample
    ],
)
def test_what_is_no_table_is_one_line_with_the_file(reader: Callable[[Path], None], fault: str, out: Path) -> None:
    table_of(Path("table/part-00000.parquet"), fault)
    with pytest.raises(KoalaError, match=r"^table/part-00000.parquet ") as raised:
        reader(Path("table"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("reader", ["table", "shard", "list"])
def test_a_file_without_permission_is_one_line(reader: str, out: Path) -> None:
    table_of(Path("table/list.parquet"), "")
    tar_of(Path("table/00000.tar"), {"1.jpg": b"x"})
    for file in Path("table").iterdir():
        file.chmod(0)
    readers: dict[str, Callable[[], object]] = {
        "table": lambda: _parts(Path("table")),
        "shard": lambda: list(read_shard(Path("table/00000.tar"))),
        "list": lambda: list(TableSource(kind="file", location="table/list.parquet").tables(Counter())),
    }
    with as_nobody(), pytest.raises(KoalaError, match=r"[Pp]ermission denied"):
        readers[reader]()


@contextmanager
def as_nobody() -> Iterator[None]:
    """Be another user than root, who may read everything."""
    user = os.geteuid()
    for folder in (Path.cwd(), *Path.cwd().parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o755) if user == 0 else None
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


# Counts.


def write_images() -> Path:
    with ShardWriter(Path("images"), 3) as writer:
        for index in range(8):
            stream = io.BytesIO()
            Image.linear_gradient("L").rotate(40 * index).convert("RGB").resize((40, 40)).save(stream, "PNG")
            writer.write(Sample(f"{index:09d}", stream.getvalue(), "png", f"a picture of number {index}", {}))
    return Path("images")


@pytest.mark.parametrize("counted", [2, 4])
def test_a_shard_of_another_count_than_img2dataset_says_is_named(counted: int, out: Path) -> None:
    images = write_images()
    (images / "00001_stats.json").write_text(json.dumps({"successes": counted}))
    with pytest.raises(KoalaError, match=rf"^images/00001.tar holds 3 images, where 00001_stats.json counts {counted}"):
        stage(FilterConfig(), images, Path("scores"), out, NoRun())


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_broken_counts_are_named(content: str, out: Path) -> None:
    images = write_images()
    (images / "00001_stats.json").write_text(content)
    with pytest.raises(KoalaError, match=r"^images/00001_stats.json is broken"):
        stage(FilterConfig(), images, Path("scores"), out, NoRun())
