import io
import json
import pickle
import tarfile
from pathlib import Path

import webdataset

from koala.data.shards import Sample, ShardWriter, read_shard, read_shards, shards


def samples(count: int) -> list[Sample]:
    return [
        Sample(f"{number:09d}", bytes([number]), "png", f"caption {number} é", {"url": f"u{number}", "width": number})
        for number in range(count)
    ]


def write(folder: Path, count: int = 5, shard_size: int = 2) -> Path:
    with ShardWriter(folder, shard_size) as writer:
        for sample in samples(count):
            writer.write(sample)
    return folder


def test_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    assert list(read_shards(write(tmp_path))) == samples(5)
    assert [shard.name for shard in shards(tmp_path)] == ["00000.tar", "00001.tar", "00002.tar"]


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    first = [shard.read_bytes() for shard in shards(write(tmp_path / "a"))]
    (tmp_path / "b").mkdir(mode=0o700)
    assert [shard.read_bytes() for shard in shards(write(tmp_path / "b"))] == first
    with tarfile.open(tmp_path / "a" / "00000.tar") as tar:
        assert {(member.mtime, member.uid, member.gid, member.mode) for member in tar} == {(0, 0, 0, 0o644)}


def test_webdataset_reads_them(tmp_path: Path) -> None:
    urls = [str(shard) for shard in shards(write(tmp_path))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [(row["__key__"], row["png"], json.loads(row["json"])) for row in read] == [
        (sample.key, sample.image, sample.meta) for sample in samples(5)
    ]


def test_samples_are_sorted_and_incomplete_ones_skipped(tmp_path: Path) -> None:
    """img2dataset writes in the order in which images arrive."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("2.txt", "2.jpg", "3.json", "1.jpg", "1.txt"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"7"))
    assert [(sample.key, sample.caption, sample.meta) for sample in read_shard(tmp_path / "x.tar")] == [
        ("1", "7", {}),
        ("2", "7", {}),
    ]


def test_keys_are_webdatasets(tmp_path: Path) -> None:
    """What `tar` makes of a folder: a leading ./, folders, hidden files, extensions of several parts."""
    members = {"./a/1.jpg": b"1", "./a/1.txt": b"x", "b.c/2.jpg": b"2", "b.c/2.seg.png": b"3", "./._1.jpg": b"4"}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for folder in (".", "./a"):
            member = tarfile.TarInfo(folder)
            member.type = tarfile.DIRTYPE
            tar.addfile(member)
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    read = {sample.key: (sample.image, sample.caption) for sample in read_shard(tmp_path / "x.tar")}
    assert read == {"./a/1": (b"1", "x"), "b.c/2": (b"2", "")}
    other = webdataset.WebDataset([str(tmp_path / "x.tar")], shardshuffle=False)
    assert {row["__key__"]: row["jpg"] for row in other if row["__key__"] in read} == {"./a/1": b"1", "b.c/2": b"2"}


class _Bomb:
    def __reduce__(self) -> tuple:
        return (Path("unpickled").touch, ())


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(_Bomb())
    with tarfile.open("x.tar", "w") as tar:
        for name in ("1.pkl", "1.pyd", "1.jpg", "1.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(bomb)
            tar.addfile(member, io.BytesIO(bomb))
    assert len(list(read_shard(Path("x.tar")))) == 1
    assert not Path("unpickled").exists()


def test_samples_can_be_chosen_by_key(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 10) as writer:
        for key in "abc":
            writer.write(Sample(key, key.encode(), "jpg", f"of {key}", {}))
    found = read_shard(tmp_path / "00000.tar", {"c", "a", "other"})
    assert [(sample.key, sample.image, sample.caption) for sample in found] == [
        ("a", b"a", "of a"),
        ("c", b"c", "of c"),
    ]
