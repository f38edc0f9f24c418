"""Samples in webdataset shards: tar files of an image, its caption and its metadata, three members of one name.

    00000.tar:  000000012.jpg  000000012.txt  000000012.json  000000015.jpg  ...

Reading sorts samples by key, whatever their order in the file, and unpickles nothing. Writing is deterministic: equal
samples give equal bytes, so that DVC sees no change.
"""

import io
import json
import tarfile
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

IMAGE_EXTENSIONS = {"jpg", "jpeg", "png", "webp"}


@dataclass(frozen=True)
class Sample:
    """An encoded image with its caption and metadata."""

    key: str
    """Name of the sample's members, without the extension."""
    image: bytes
    """Encoded image."""
    extension: str
    """Extension of the image, without the dot."""
    caption: str
    """Caption; empty if the shard has none."""
    meta: dict[str, Any]
    """img2dataset's JSON (url, width, height, original_width, original_height, sha256 of the fetched file) with scores."""


def shards(folder: Path) -> list[Path]:
    """Return the folder's tar files, ordered by name."""
    return sorted(folder.glob("*.tar"))


def read_shards(folder: Path) -> Iterator[Sample]:
    """Yield all samples of a folder: shards ordered by name, samples by key."""
    for shard in shards(folder):
        yield from read_shard(shard)


def read_shard(shard: Path, only: Container[str] | None = None) -> Iterator[Sample]:
    """Yield the samples of a shard, ordered by key. Members without an image of the same key are skipped.

    Where `only` is given, the content of samples with other keys is not read.

    Keys are webdataset's: a member's path up to the first dot of its file name.
    """
    with tarfile.open(shard, "r:") as tar:
        members: dict[str, dict[str, tarfile.TarInfo]] = {}
        for member in tar.getmembers():
            folder, slash, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            if member.isfile() and stem:
                members.setdefault(folder + slash + stem, {})[extension.lower()] = member
        for key in sorted(members):
            parts = members[key]
            images = sorted(parts.keys() & IMAGE_EXTENSIONS)
            if images and (only is None or key in only):
                caption = _read(tar, parts.get("txt")).decode(errors="replace")
                meta = json.loads(_read(tar, parts.get("json")) or b"{}")
                yield Sample(key, _read(tar, parts[images[0]]), images[0], caption, meta)


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> bytes:
    file = tar.extractfile(member) if member else None
    return file.read() if file else b""


class ShardWriter:
    """A context manager that writes samples to 00000.tar, 00001.tar, ..."""

    def __init__(self, folder: Path, shard_size: int) -> None:
        """Write to `folder`, `shard_size` samples per shard."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._shard_size = shard_size
        self._written = 0
        self._tar: tarfile.TarFile | None = None

    def write(self, sample: Sample) -> None:
        """Append a sample, to a new shard if the current one is full."""
        if self._written % self._shard_size == 0:
            self._close()
            shard = self._folder / f"{self._written // self._shard_size:05d}.tar"
            self._tar = tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._add(f"{sample.key}.{sample.extension}", sample.image)
        self._add(f"{sample.key}.txt", sample.caption.encode())
        self._add(f"{sample.key}.json", json.dumps(sample.meta, sort_keys=True).encode())
        self._written += 1

    def _add(self, name: str, content: bytes) -> None:
        # A new TarInfo holds no time, owner or umask of this machine.
        member = tarfile.TarInfo(name)
        member.size = len(content)
        assert self._tar is not None
        self._tar.addfile(member, io.BytesIO(content))

    def _close(self) -> None:
        if self._tar:
            self._tar.close()
            self._tar = None

    def __enter__(self) -> "ShardWriter":
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the last shard."""
        self._close()
