"""Pins of source lists: which content of a location is meant. source.lock.yaml holds them, and git tracks it.

    demo-list:                        # a profile
      location: s3://bucket/list.parquet
      files: {list.parquet: 'etag:"9b2c..." version:3HL4...'}
      rows: 1203311

`koala data update` moves a pin. Keep this module light to import: it is read with params.yaml.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from koala.config import Config
from koala.errors import KoalaError

FILE = Path("source.lock.yaml")
_HEADER = (
    "# Which content of a profile's source is meant. `koala data update` writes it, git tracks it, DVC reads it.\n"
)


class Pin(Config):
    """The content of a list at one moment."""

    location: str
    """Location that was resolved: source.location of params.yaml."""
    commit: str | None = None
    """Commit of the data set on the Hub."""
    files: dict[str, str]
    """What marks the content of each file, in the order in which they are read: SHA-256, or ETag and version on S3."""
    rows: int
    """Usable rows."""

    @property
    def digest(self) -> str:
        """Return what tells this pin from others."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


_PINS = TypeAdapter(dict[str, Pin])


def read(file: Path = FILE) -> dict[str, Pin]:
    """Return the pin of each profile that has one. Raises KoalaError if the file is not what `write` makes."""
    try:
        return _PINS.validate_python(yaml.safe_load(file.read_text()) or {})
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, ValidationError):
        raise KoalaError(f"{file} is damaged: restore it from git, or remove it and run `koala data update`") from None


def write(pins: Mapping[str, Pin], file: Path = FILE) -> None:
    """Write all pins, in one step."""
    values = {profile: pin.model_dump(exclude_none=True) for profile, pin in sorted(pins.items())}
    unfinished = file.with_suffix(".part")
    unfinished.write_text(_HEADER + yaml.safe_dump(values, sort_keys=False, width=130))
    unfinished.replace(file)
