"""Damaged folders: each kind of damage is one line that names the file, before or when it is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.torch import load_file, save_file

from koala.bench.models import random_latents
from koala.data import manifest
from koala.data.config import FilterConfig
from koala.data.filter import filter as filter_stage
from koala.data.latents import COLUMNS, LatentSet
from koala.data.shards import Sample, ShardWriter, read_shard, shards
from koala.errors import KoalaError
from koala.run import STATE, NoRun


def png() -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.random.default_rng().integers(256, size=(32, 32, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three shards of two samples, with a manifest."""
    with ShardWriter(tmp_path / "images", shard_size=2) as writer:
        for number in range(6):
            writer.write(Sample(f"{number:09d}", png(), "png", f"caption {number}", {}))
    manifest.write(tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    """Five encoded samples in two buckets, with a manifest."""
    random_latents(tmp_path / "latents", {(32, 32): 3, (32, 64): 2}, factor=4)
    manifest.write(tmp_path / "latents")
    return tmp_path / "latents"


def test_a_manifest_says_bytes_hash_and_samples(images: Path, latents: Path) -> None:
    assert {name: entry.samples for name, entry in manifest.read(images).files.items()} == {
        "00000.tar": 2,
        "00001.tar": 2,
        "00002.tar": 2,
    }
    assert {name: entry.samples for name, entry in manifest.read(latents).files.items()} == {
        "00000-32x32.safetensors": 3,
        "00000-32x64.safetensors": 2,
        "00000.arrow": 5,
        "00000.parquet": 5,
    }
    before = (images / manifest.FILE).read_bytes()
    manifest.write(images)
    assert (images / manifest.FILE).read_bytes() == before
    (images / STATE).mkdir()
    (images / STATE / "left.tar").touch()
    manifest.check(images)


# What can happen to a file.


def cut(file: Path, size: int | None = None) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: size or len(content) // 2])


def cut_between_members(file: Path) -> None:
    import tarfile

    with tarfile.open(file) as tar:
        cut(file, tar.getmembers()[3].offset)


def change(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[600] ^= 1
    file.write_bytes(content)


def bare(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """Damage in a folder without a manifest."""

    def run(file: Path) -> None:
        (file.parent / manifest.FILE).unlink()
        damage(file)

    return run


def empty(file: Path) -> None:
    file.write_bytes(b"")


def garbage(file: Path) -> None:
    file.write_bytes(b"<html>" * 1000)


def copy(name: str) -> Callable[[Path], None]:
    return lambda file: shutil.copy(file, file.with_name(name))


def break_manifest(file: Path) -> None:
    (file.parent / manifest.FILE).write_text('{"files": ')


SHARDS = {
    "truncated in a member": (cut, r"00001\.tar is truncated: \d+ bytes, where manifest\.json says \d+"),
    "truncated between members": (cut_between_members, r"00001\.tar is truncated"),
    "empty": (empty, r"00001\.tar is empty"),
    "vanished": (Path.unlink, r"00001\.tar is missing, though manifest\.json lists it"),
    "grown": (lambda file: file.write_bytes(file.read_bytes() + bytes(512)), r"00001\.tar has grown"),
    "another content": (change, r"00001\.tar has another content than manifest\.json says"),
    "one that is foreign": (copy("00007.tar"), r"00007\.tar is foreign"),
    "no manifest that can be read": (break_manifest, r"manifest\.json is broken"),
    "bare, truncated in a member": (bare(cut), r"00001\.tar is truncated, or no tar file"),
    "bare, truncated between members": (bare(cut_between_members), r"00001\.tar is truncated, or no tar file"),
    "bare, empty": (bare(empty), r"00001\.tar is empty"),
    "bare, no tar file": (bare(garbage), r"00001\.tar is truncated, or no tar file"),
}


@pytest.mark.parametrize(("damage", "line"), SHARDS.values(), ids=SHARDS)
def test_damaged_shards_are_named(images: Path, tmp_path: Path, damage: Callable[[Path], None], line: str) -> None:
    """By the filter; the stage `encode` reads them in the same way."""
    (tmp_path / "out").mkdir()
    damage(images / "00001.tar")
    with pytest.raises(KoalaError, match=line):
        filter_stage(FilterConfig(), images, tmp_path / "scores", tmp_path / "out", NoRun())


@pytest.mark.parametrize("name", ["another content", "bare, truncated between members", "vanished"])
def test_damaged_shards_are_named_by_encode(images: Path, tiny_teacher: Path, tmp_path: Path, name: str) -> None:
    from koala.data.config import EncodeConfig
    from koala.data.encode import encode

    damage, line = SHARDS[name]
    (tmp_path / "out").mkdir()
    damage(images / "00001.tar")
    with pytest.raises(KoalaError, match=line):
        encode(EncodeConfig(buckets=((32, 32),)), images, tiny_teacher, tmp_path / "out", NoRun())


def test_a_shard_that_vanishes_while_it_is_read_is_named(images: Path) -> None:
    file = shards(images)[0]
    file.unlink()
    with pytest.raises(KoalaError, match=r"00000\.tar is missing"):
        list(read_shard(file))


def other_keys(file: Path) -> None:
    save_file(load_file(file), file, metadata={"keys": "those of another shard"})


def a_latent_more(file: Path) -> None:
    tensor = load_file(file)["latents"]
    save_file({"latents": tensor.repeat(2, 1, 1, 1)}, file)


def other_columns(file: Path) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, COLUMNS.remove(0)):
        pass


LATENTS = {
    "table truncated": ("00000.arrow", cut, r"00000\.arrow is truncated: "),
    "table empty": ("00000.arrow", empty, r"00000\.arrow is empty"),
    "table vanished": ("00000.arrow", Path.unlink, r"00000\.arrow is missing"),
    "record truncated": ("00000.parquet", cut, r"00000\.parquet is truncated: "),
    "record vanished": ("00000.parquet", Path.unlink, r"00000\.parquet is missing"),
    "latents truncated": ("00000-32x64.safetensors", cut, r"00000-32x64\.safetensors is truncated: "),
    "latents empty": ("00000-32x64.safetensors", empty, r"00000-32x64\.safetensors is empty"),
    "latents vanished": ("00000-32x64.safetensors", Path.unlink, r"00000-32x64\.safetensors is missing"),
    "a foreign table": ("00000.arrow", copy("00001.arrow"), r"00001\.arrow is foreign"),
    "bare, table truncated": ("00000.arrow", bare(cut), r"00000\.arrow is truncated, or no table"),
    "bare, no table": ("00000.arrow", bare(garbage), r"00000\.arrow is truncated, or no table"),
    "bare, table vanished": ("00000.arrow", bare(Path.unlink), r"holds no encoded samples"),
    "bare, other columns": ("00000.arrow", bare(other_columns), r"00000\.arrow has other columns"),
    "bare, latents truncated": (
        "00000-32x32.safetensors",
        bare(cut),
        r"00000-32x32\.safetensors is truncated, or holds",
    ),
    "bare, no latents": ("00000-32x32.safetensors", bare(garbage), r"00000-32x32\.safetensors is truncated, or holds"),
    "bare, latents vanished": ("00000-32x32.safetensors", bare(Path.unlink), r"00000-32x32\.safetensors is missing"),
    "bare, latents of others": ("00000-32x32.safetensors", bare(other_keys), r"holds the latents of other samples"),
    "bare, more latents": ("00000-32x32.safetensors", bare(a_latent_more), r"holds the latents of other samples"),
}


@pytest.mark.parametrize(("name", "damage", "line"), LATENTS.values(), ids=LATENTS)
def test_damaged_latents_are_named(latents: Path, name: str, damage: Callable[[Path], None], line: str) -> None:
    damage(latents / name)
    with pytest.raises(KoalaError, match=line):
        [data[index] for data in [LatentSet(latents)] for index in range(len(data))]


# What is resumed.


def test_unfinished_work_is_resumed_by_the_same_recipe_on_the_same_inputs_only(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    manifest.resume(out, FilterConfig(), images)
    (out / "00000.tar").touch()
    manifest.resume(out, FilterConfig(machine={"processes": 2}), images)
    with pytest.raises(KoalaError, match="out holds work of another recipe or on other inputs"):
        manifest.resume(out, FilterConfig(shard_size=7), images)
    change(images / "00000.tar")
    manifest.write(images)
    with pytest.raises(KoalaError, match="other inputs, which is not resumed: empty it"):
        manifest.resume(out, FilterConfig(), images)
    assert (out / "00000.tar").is_file()


def test_files_of_unknown_origin_are_not_taken_for_finished_work(images: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    shutil.copy(images / "00000.tar", tmp_path / "out")
    with pytest.raises(KoalaError, match="out holds work of another recipe"):
        manifest.resume(tmp_path / "out", FilterConfig(), images)


@pytest.mark.parametrize("bare_folder", [False, True])
def test_a_filter_is_not_resumed_over_a_download_that_was_made_anew(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bare_folder: bool
) -> None:
    """Judged, then killed before it writes; the download is made anew with the same keys and other pictures."""
    from koala.data import filter as module

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    if bare_folder:
        (images / manifest.FILE).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_kept", dies)
        with pytest.raises(KeyboardInterrupt):
            filter_stage(FilterConfig(), images, tmp_path / "scores", tmp_path / "out", NoRun())
    with ShardWriter(images, shard_size=2) as writer:
        for number in range(6):
            writer.write(Sample(f"{number:09d}", png(), "png", f"other {number}", {}))
    if not bare_folder:
        manifest.write(images)
    with pytest.raises(KoalaError, match="work of another recipe or on other inputs"):
        filter_stage(FilterConfig(), images, tmp_path / "scores", tmp_path / "out", NoRun())


def test_the_manifest_does_not_change_with_the_recipe_that_made_the_same_data(images: Path, tmp_path: Path) -> None:
    found = []
    for size in (10, 20):
        out = tmp_path / str(size)
        out.mkdir()
        filter_stage(FilterConfig(shard_size=size), images, tmp_path / "scores", out, NoRun())
        found.append((out / manifest.FILE).read_bytes())
    assert found[0] == found[1]
    assert json.loads(found[0])["files"]["00000.tar"]["samples"] == 6
