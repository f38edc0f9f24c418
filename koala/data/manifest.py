"""Manifests: what a stage made, file by file, so that the next one reads all of it and nothing else.

    manifest.check(images)                   # names and sizes, at once: raises KoalaError on the first that is wrong
    manifest.resume(out, config, images)     # refuses what another recipe or other inputs have left in `out`
    ...
    manifest.verify(shard)                   # the hash, where a file is read from end to end anyway
    ...
    manifest.write(out)                      # last of all

manifest.json lists bytes, SHA-256 and number of samples of each data file. It does not name the recipe: the same data made in
another way has the same manifest. A folder without one is accepted: other people's shards have none.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from koala.config import Config
from koala.errors import KoalaError
from koala.run import STATE

FILE = "manifest.json"
SUFFIXES = (".tar", ".parquet", ".arrow", ".safetensors")
"""Data files. Reports and plots are not listed."""
_MADE_BY = "made-by.json"
_HEAD_BYTES = 2**16
_REMEDY = "restore it (`dvc checkout`), or make the folder again"


@dataclass(frozen=True)
class Entry:
    """What a manifest says of a file."""

    bytes: int
    """Size."""
    sha256: str
    """Hash of the content, hexadecimal."""
    samples: int
    """Samples of a tar file, rows of a table, latents of a safetensors file."""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    inputs: list[str]
    """Hash of each folder that it was made from; empty if not recorded."""
    files: dict[str, Entry]
    """The data files by their path in the folder."""


def write(folder: Path, *inputs: Path) -> None:
    """Write the manifest of a finished folder. Every data file is read once.

    `inputs` are recorded where a later call would take finished files for its own.
    """
    files = sorted(_data_files(folder))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter's lock
        entries = list(pool.map(_entry, files))
    document = {
        "inputs": [_fingerprint(each) for each in inputs],
        "files": {_name(file, folder): asdict(entry) for file, entry in zip(files, entries, strict=True)},
    }
    _write(folder / FILE, document)


def read(folder: Path) -> Manifest | None:
    """Return a folder's manifest, or None if it has none. Raises KoalaError if it cannot be read."""
    file = folder / FILE
    try:
        return _parse(file, file.stat().st_mtime_ns)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise KoalaError(f"{file} is broken: {_REMEDY}") from None


@lru_cache(maxsize=8)
def _parse(file: Path, _changed: int) -> Manifest:
    document = json.loads(file.read_text())
    return Manifest(document["inputs"], {name: Entry(**entry) for name, entry in document["files"].items()})


def check(folder: Path, parts: Sequence[str] | None = None) -> None:
    """Compare names and sizes of a folder's data files with its manifest. Without one, only empty files are refused.

    parts: folders in it that are looked at, where not all of it is.

    Raises:
        KoalaError: A file is missing, empty, truncated, of another size, or not listed.
    """
    found = {_name(file, folder): file.stat().st_size for file in _data_files(folder)}
    manifest = read(folder)
    listed = dict(manifest.files) if manifest else {}
    if parts is not None:
        for names in (found, listed):
            for name in [name for name in names if name.partition("/")[0] not in parts]:
                del names[name]
    for name in listed:
        if name not in found:
            raise KoalaError(f"{folder / name} is missing, though {FILE} lists it: {_REMEDY}")
    for name, size in sorted(found.items()):
        if manifest and name not in listed:
            raise KoalaError(f"{folder / name} is foreign: {FILE} does not list it; move it out of the folder")
        expected = listed[name].bytes if manifest else None
        if size == 0:
            raise KoalaError(f"{folder / name} is empty: {_REMEDY}")
        if expected is not None and size != expected:
            how = "is truncated" if size < expected else "has grown"
            raise KoalaError(f"{folder / name} {how}: {size} bytes, where {FILE} says {expected}; {_REMEDY}")


def verify(file: Path, folder: Path | None = None) -> None:
    """Compare the content of one file with its folder's manifest, if that lists it, and a shard with img2dataset's counts.

    folder: where the manifest is, if not beside the file.
    Raises KoalaError if they differ.
    """
    folder = folder or file.parent
    manifest = read(folder)
    entry = manifest.files.get(_name(file, folder)) if manifest else None
    with _readable(file):
        if entry and _sha256(file) != entry.sha256:
            raise KoalaError(f"{file} has another content than {FILE} says: {_REMEDY}")
    counts = file.with_name(f"{file.stem}_stats.json")
    if file.suffix == ".tar" and counts.is_file():
        check_count(file, counts)


def check_count(shard: Path, counts: Path) -> None:
    """Compare a shard with the images that img2dataset counted. Raises KoalaError if they are of other numbers."""
    from koala.data.shards import index

    try:
        expected = json.loads(counts.read_text())["successes"]
    except (OSError, ValueError, KeyError, TypeError):
        raise KoalaError(f"{counts} is broken: {_REMEDY}") from None
    if (found := len(index(shard))) != expected:
        raise KoalaError(f"{shard} holds {found} images, where {counts.name} counts {expected}: {_REMEDY}")


def resume(out: Path, config: Config, *inputs: Path) -> None:
    """Record what `out` is made by; refuse to resume what was made by something else.

    Nothing is deleted. Raises KoalaError if `out` holds unfinished work of another recipe, work on other inputs, or data files
    of unknown origin.
    """
    made_by = {"recipe": config.resume_key(), "inputs": [_fingerprint(folder) for folder in inputs]}
    record, manifest = out / STATE / _MADE_BY, read(out)
    if record.is_file():
        same = json.loads(record.read_text()) == made_by
    elif manifest:
        same = not manifest.inputs or manifest.inputs == made_by["inputs"]
    else:
        same = not any(_data_files(out))
    if not same:
        raise KoalaError(
            f"{out} holds work of another recipe or on other inputs, which is not resumed: empty it, or name another folder"
        )
    record.parent.mkdir(exist_ok=True)
    _write(record, made_by)


def _fingerprint(folder: Path) -> str:
    """Return the hash of what a folder's manifest lists; without one, of its files' names, sizes and first bytes."""
    digest = hashlib.sha256()
    if manifest := read(folder):
        for name, entry in manifest.files.items():
            digest.update(f"{name}\0{entry.sha256}\n".encode())
        return digest.hexdigest()
    for file in sorted(file for file in folder.iterdir() if file.is_file() and file.name != "provenance.json"):
        with _readable(file), file.open("rb") as stream:
            head = hashlib.sha256(stream.read(_HEAD_BYTES)).hexdigest()
        digest.update(f"{file.name}\0{file.stat().st_size}\0{head}\n".encode())
    return digest.hexdigest()


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Raise KoalaError where a file cannot be read inside the block."""
    try:
        yield
    except OSError as error:
        raise KoalaError(f"{file} cannot be read ({error.strerror}): {_REMEDY}") from None


def _write(file: Path, document: dict[str, Any]) -> None:
    unfinished = file.with_name(f"{file.name}.part")
    unfinished.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(unfinished, file)


def _data_files(folder: Path) -> Iterator[Path]:
    """Yield a folder's data files, also of folders in it, but for the state of unfinished work."""
    for file in folder.rglob("*"):
        if file.suffix in SUFFIXES and file.is_file() and file.relative_to(folder).parts[0] != STATE:
            yield file


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _entry(file: Path) -> Entry:
    return Entry(file.stat().st_size, _sha256(file), _samples(file))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _samples(file: Path) -> int:
    if file.suffix == ".tar":
        from koala.data.shards import index

        return len(index(file))
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        return int(pq.read_metadata(file).num_rows)
    if file.suffix == ".arrow":
        import pyarrow as pa

        with pa.memory_map(str(file)) as source:
            return int(pa.ipc.open_file(source).read_all().num_rows)
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return int(next(tensor["shape"][0] for name, tensor in header.items() if name != "__metadata__"))
