"""Faults of what comes from outside, many of a kind: each is one line that names it, or a cause that is counted."""

import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from koala.data import decide, judge, manifest
from koala.data import filter as filtering
from koala.data.config import FilterConfig
from koala.data.decode import DecodeConfig, UnusableError, normalised
from koala.data.fetch import quoted, retry_after
from koala.data.filter import filter as stage
from koala.data.forget import read, read_hashes
from koala.data.rules.words import Words
from koala.data.shards import Sample, ShardWriter, read_shard, shards
from koala.data.source import source
from koala.data.tables import TableSource
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


# A full disk.


def write_images() -> Path:
    with ShardWriter(Path("images"), 3) as writer:
        for index in range(8):
            stream = io.BytesIO()
            Image.linear_gradient("L").rotate(40 * index).convert("RGB").resize((40, 40)).save(stream, "PNG")
            writer.write(Sample(f"{index:09d}", stream.getvalue(), "png", f"a picture of number {index}", {}))
    return Path("images")


def digests(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def full_after(calls: int, write: Callable[..., Any]) -> Callable[..., Any]:
    """`write`, after so many calls of which the disk is full."""
    left = [calls]

    def writes(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device", "x")
        return write(*arguments, **named)

    return writes


@pytest.mark.parametrize(
    ("module", "name", "calls"),
    [
        *((judge.pq, "write_table", calls) for calls in range(5)),  # three judged tables, then verdicts
        *((judge.os, "replace", calls) for calls in range(4)),
        *((filtering, "write_shard", calls) for calls in range(3)),
        (decide, "_write_verdicts", 0),
    ],
)
def test_the_filter_resumes_after_a_full_disk(
    module: Any, name: str, calls: int, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, config = write_images(), FilterConfig(rules=(Words(),), shard_size=3)
    Path("whole").mkdir()
    stage(config, images, Path("scores"), Path("whole"), NoRun())
    with monkeypatch.context() as patched:
        patched.setattr(module, name, full_after(calls, getattr(module, name)))
        with pytest.raises(OSError, match="No space left"):
            stage(config, images, Path("scores"), out, NoRun())
    stage(config, images, Path("scores"), out, NoRun())
    assert digests(out) == digests(Path("whole"))
    assert len([sample for shard in shards(out) for sample in read_shard(shard)]) == 8


def test_source_resumes_after_a_full_disk(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("list.csv").write_text(
        "url,caption\n" + "".join(f"https://example.com/{n}.jpg,picture {n}\n" for n in range(9))
    )
    config = TableSource(kind="file", location="list.csv")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full_after(0, os.replace))
        with pytest.raises(OSError, match="No space left"):
            source(config, out=out, run=NoRun())
    source(config, out=out, run=NoRun())
    import pyarrow.parquet as pq

    assert pq.read_table(out / "part-00000.parquet").num_rows == 9
