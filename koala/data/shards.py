"""Samples in webdataset shards: tar files of an image, its caption and its metadata, three members of one name.

    00000.tar:  000000012.jpg  000000012.txt  000000012.json  000000015.jpg  ...

Reading sorts samples by key, whatever their order in the file, and unpickles nothing. Writing is deterministic: equal
samples give equal bytes, so that DVC sees no change.
"""

import io
import json
import math
import os
import tarfile
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

from koala.errors import KoalaError

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
    """img2dataset's JSON (url, width, height, original_width, original_height, sha256 of the fetched file) with scores. In other
    people's shards its values are anything: `text`, `number` and `recorded_size` read them."""

    def text(self, name: str) -> str | None:
        """Return a value of the metadata as text of valid Unicode, None where there is none."""
        value = self.meta.get(name)
        return None if value is None else str(value).encode(errors="replace").decode()

    def number(self, name: str) -> float:
        """Return a value of the metadata as a number, NaN where it is none."""
        value = self.meta.get(name)
        try:
            return float(value) if isinstance(value, int | float) else math.nan
        except OverflowError:
            return math.nan

    @property
    def recorded_size(self) -> tuple[int, int] | None:
        """Height and width in pixels before the download resized the image, if recorded."""
        found = [self.meta.get(f"original_{side}") for side in ("height", "width")]
        sizes = [int(side) for side in found if isinstance(side, int | float) and 0 < side < 2**31]
        return (sizes[0], sizes[1]) if len(sizes) == 2 else None


def shards(folder: Path) -> list[Path]:
    """Return the folder's tar files, ordered by name."""
    return sorted(folder.glob("*.tar"))


def read_shards(folder: Path) -> Iterator[Sample]:
    """Yield all samples of a folder: shards ordered by name, samples by key."""
    for shard in shards(folder):
        yield from read_shard(shard)


def read_shard(shard: Path, only: Container[str] | None = None) -> Iterator[Sample]:
    """Yield the samples of a shard, ordered by key. Members without an image of the same key are skipped.

    Where `only` is given, samples with other keys are not read.
    Raises KoalaError if the shard is no whole tar file, or a sample's metadata are no JSON.
    """
    for place in index(shard):
        if only is None or place.key in only:
            yield place.read()


Span = tuple[int, int]
"""Offset and size of a member's content in its tar file, bytes."""


@dataclass(frozen=True)
class Place:
    """Where a sample is in its shard."""

    shard: Path
    """The tar file."""
    key: str
    """Name of the sample's members, without the extension."""
    extension: str
    """Extension of the image, without the dot."""
    image: Span
    """The encoded image."""
    caption: Span
    """The caption; of size 0 if there is none."""
    meta: Span
    """The metadata; of size 0 if there are none."""

    def read(self) -> Sample:
        """Read the sample. Raises KoalaError if its metadata are no JSON object."""
        with self.shard.open("rb") as file:
            image, caption, meta = (_read(file, span) for span in (self.image, self.caption, self.meta))
        try:
            found = json.loads(meta or b"{}")
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise KoalaError(
                f"{self.shard}: the metadata of {self.key} are no JSON object: repair or remove that sample"
            )
        return Sample(self.key, image, self.extension, caption.decode(errors="replace"), found)


def index(shard: Path) -> list[Place]:
    """Return the places of a shard's samples, ordered by key, by reading the headers of its members only.

    Keys are webdataset's: a member's path up to the first dot of its file name. Raises KoalaError if the shard is no whole
    tar file, or two members have one name: one would be lost.
    """
    members: dict[str, dict[str, Span]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in _members(tar):
                # Names that are not UTF-8 become names that are.
                folder, slash, name = member.name.encode(errors="backslashreplace").decode().rpartition("/")
                stem, _, extension = name.partition(".")
                if member.isfile() and stem:
                    parts = members.setdefault(folder + slash + stem, {})
                    if extension.lower() in parts:
                        raise KoalaError(f"{shard} holds {member.name!r} twice: make it again with names of their own")
                    parts[extension.lower()] = (member.offset_data, member.size)
    except FileNotFoundError:
        raise KoalaError(f"{shard} is missing: restore it, or make it again") from None
    except (tarfile.TarError, EOFError):
        raise KoalaError(f"{shard} is truncated, or no tar file: restore it, or make it again") from None
    except OSError as error:  # a folder, no permission, a broken disk
        raise KoalaError(f"{shard} cannot be read ({error.strerror}): restore it, or make it again") from None
    places = []
    for key in sorted(members):
        parts = members[key]
        if images := sorted(parts.keys() & IMAGE_EXTENSIONS):
            caption, meta = (parts.get(extension, (0, 0)) for extension in ("txt", "json"))
            places.append(Place(shard, key, images[0], parts[images[0]], caption, meta))
    return places


def _members(tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """Return a tar file's members. tarfile takes a broken or missing header for the end: insist on the end's zeros."""
    members = tar.getmembers()
    file = cast(BinaryIO, tar.fileobj)
    file.seek(tar.offset)
    end = file.read(tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE or any(end):
        raise tarfile.ReadError(f"it breaks off at byte {tar.offset}")
    while more := file.read(1 << 20):
        if any(more):
            raise tarfile.ReadError("it goes on after its end")
    return members


def _read(file: BinaryIO, span: Span) -> bytes:
    file.seek(span[0])
    return file.read(span[1])


def write_shard(file: Path, samples: Iterable[Sample], unfinished: Path) -> None:
    """Write samples to a tar file. It lies at `unfinished`, on the same file system, until it is whole."""
    with _created(unfinished) as tar:
        for sample in samples:
            _add(tar, sample)
    os.replace(unfinished, file)


def _created(file: Path) -> tarfile.TarFile:
    # PAX differs from USTAR only where a name is long or not ASCII.
    return tarfile.open(file, "w", format=tarfile.PAX_FORMAT)


def _add(tar: tarfile.TarFile, sample: Sample) -> None:
    meta = json.dumps(sample.meta, sort_keys=True).encode()
    for extension, content in ((sample.extension, sample.image), ("txt", sample.caption.encode()), ("json", meta)):
        # A new TarInfo holds no time, owner or umask of this machine.
        member = tarfile.TarInfo(f"{sample.key}.{extension}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


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
            self._tar = _created(self._folder / f"{self._written // self._shard_size:05d}.tar")
        assert self._tar is not None
        _add(self._tar, sample)
        self._written += 1

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
