"""Takedown: images that must not be trained on, by URL, SHA-256 or perceptual hash, each with a reason.

They stand in forget.yaml, which git tracks. `koala data forget` adds to it; the next filter leaves them out.
"""

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from koala.config import Config
from koala.errors import KoalaError, line_of

FILE = Path("forget.yaml")

Sha256 = Annotated[str, StringConstraints(to_lower=True, pattern=r"^[0-9a-fA-F]{64}$")]
DHash = Annotated[str, StringConstraints(to_lower=True, pattern=r"^[0-9a-fA-F]{16}$")]


class Forgotten(Config):
    """An image that is taken down, by exactly one of URL, SHA-256 and dHash."""

    url: str | None = Field(default=None, min_length=1)
    """The image's URL, as the table has it."""
    sha256: Sha256 | None = None
    """SHA-256 of the image in a shard, or of the file that was fetched."""
    dhash: DHash | None = None
    """64-bit difference hash (koala.data.fingerprints), 16 hex digits."""
    bits: int = Field(default=4, ge=0, le=16)
    """Bits in which an image's dHash may differ from `dhash`."""
    because: str = Field(min_length=1)
    """Why."""
    on: date
    """When it was added."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.url, self.sha256, self.dhash)) != 1:
            raise ValueError("name exactly one of url, sha256 and dhash")
        return self


def read(file: Path = FILE) -> tuple[Forgotten, ...]:
    """Return all entries; none where there is no file. Raises KoalaError where it does not hold such entries."""
    if not file.is_file():
        return ()
    try:
        return TypeAdapter(tuple[Forgotten, ...]).validate_python(yaml.safe_load(file.read_text()) or ())
    except (yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
        raise KoalaError(
            f"{file} does not hold takedowns: {line_of(error)}: write them by `koala data forget`"
        ) from None


def add(because: str, file: Path = FILE, **what: str | None) -> Forgotten:
    """Append an entry to `file`. what: url, sha256 or dhash. Raises KoalaError where it is none of them."""
    try:
        entry = Forgotten.model_validate({**what, "because": because, "on": datetime.now(UTC).date()})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise KoalaError(f"{name + ': ' if name else ''}{first['msg'].removeprefix('Value error, ')}") from None
    with file.open("a") as stream:
        yaml.safe_dump([entry.model_dump(mode="json", exclude_none=True)], stream, sort_keys=False, allow_unicode=True)
    return entry


def read_hashes(files: tuple[str, ...]) -> tuple[list[bytes], list[int]]:
    """Return the SHA-256 and the dHashes of hash lists. Raises KoalaError for a missing file and a line that holds neither."""
    exact, perceptual = [], []
    for file in files:
        try:
            lines = Path(file).read_text(encoding="ascii").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise KoalaError(f"filter.hash_lists: {file} cannot be read ({error}): name a file of hashes") from None
        for number, line in enumerate(lines, start=1):
            text = line.partition("#")[0].strip()
            try:
                value = bytes.fromhex(text)
            except ValueError:
                value = b"?"
            if len(value) == 32:
                exact.append(value)
            elif len(value) == 8:
                perceptual.append(int.from_bytes(value))
            elif value:
                raise KoalaError(f"{file}, line {number}: neither a SHA-256 (64 hex digits) nor a dHash (16)")
    return exact, perceptual
