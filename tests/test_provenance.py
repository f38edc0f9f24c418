"""The hash of a folder's content."""

import os
import shutil
from pathlib import Path

import pytest

from koala import provenance


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder/sub").mkdir(parents=True)
    (tmp_path / "folder/a").write_text("one")
    (tmp_path / "folder/sub/b").write_text("two")
    return tmp_path / "folder"


def test_it_follows_from_names_and_content_only(folder: Path, tmp_path: Path) -> None:
    known = tmp_path / "hashes"
    first = provenance.content_hash(folder, known)
    shutil.copytree(folder, tmp_path / "copy")
    assert provenance.content_hash(tmp_path / "copy", tmp_path / "others") == first
    (folder / "a").rename(folder / "c")
    assert provenance.content_hash(folder, known) != first


def test_a_file_changed_in_place_is_seen_though_its_size_stays(folder: Path, tmp_path: Path) -> None:
    known = tmp_path / "hashes"
    first = provenance.content_hash(folder, known)
    before = (folder / "a").stat()
    (folder / "a").write_text("eno")
    os.utime(folder / "a", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert provenance.content_hash(folder, known) != first


def test_known_files_are_not_read_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = tmp_path / "hashes"
    first = provenance.content_hash(folder, known)

    def read(*_: object) -> None:
        raise AssertionError("a file was read")

    monkeypatch.setattr(provenance.hashlib, "file_digest", read)
    assert provenance.content_hash(folder, known) == first


def test_the_provenance_itself_does_not_count(folder: Path, tmp_path: Path) -> None:
    known = tmp_path / "hashes"
    first = provenance.content_hash(folder, known)
    provenance.write(folder, {"run_id": "abc"})
    assert provenance.content_hash(folder, known) == first
    assert provenance.read(folder) == {"run_id": "abc"}
    assert provenance.read(tmp_path) == {}
    (folder / "sub/provenance.json").write_text("{}")
    assert provenance.content_hash(folder, known) != first
