"""Parameters of a list of URLs in files. Keep this module light to import: it is read with params.yaml."""

from abc import ABC
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from koala.config import Config
from koala.data.config import RESERVED_COLUMNS, SourceConfig
from koala.data.pins import Pin
from koala.data.presets import Preset, filled_in


class Bounds(Config):
    """Bounds of a column's values, both included. A row without a value is outside."""

    at_least: float | None = None
    """Least value."""
    at_most: float | None = None
    """Greatest value."""

    @model_validator(mode="after")
    def _bound(self) -> Self:
        if self.at_least is None and self.at_most is None:
            raise ValueError("give at_least, at_most or both")
        return self


class TableConfig(SourceConfig, ABC):
    """Tables in parquet, CSV, TSV or JSON, from disk, from a data set on the Hugging Face Hub, or from S3."""

    kind: Literal["file", "hub", "s3"]
    """Where the table is: on disk, in a data set on the Hub, or on S3."""
    preset: Preset | None = None
    """A public list whose columns, and place on the Hub, are known; what is given beside it takes their place."""
    location: str
    """Path (file), owner/name (hub) or s3://bucket/key (s3): a file, a folder, or a pattern of files such as `lists/*.csv`."""
    files: tuple[str, ...] = ()
    """Files under `location`, or patterns of them, read in this order. Required for the Hub."""
    revision: str | None = None
    """Revision of the data set. Required for the Hub: a commit, or a branch that `koala data update` pins."""
    columns: tuple[str, ...] = ()
    """Names of the columns of CSV and TSV files that have no header line."""
    quoted: bool = True
    """Whether fields of CSV and TSV files may stand in double quotes; if not, a quote is a character like others."""
    url_column: str = "url"
    """Column of image URLs."""
    caption_column: str = "caption"
    """Column of captions."""
    where: dict[str, Bounds] = Field(default_factory=dict)
    """Bounds of numeric columns that a row must meet, such as `{aesthetic: {at_least: 5}, WIDTH: {at_least: 768}}`."""
    carry: tuple[str, ...] = ()
    """Other columns to carry along into each sample, such as a licence or an id. Those of CSV and JSON are text."""
    private_hosts: bool = False
    """Keep URLs that name this machine or a private address. Set it only for a list of your own."""
    pin: Pin | None = None
    """The content that is meant: from source.lock.yaml."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        return filled_in(values) if isinstance(values, dict) else values

    @field_validator("carry")
    @classmethod
    def _not_img2datasets(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        if taken := RESERVED_COLUMNS.intersection(columns):
            raise ValueError(f"img2dataset keeps the name {min(taken)!r} for itself; rename the column")
        return columns

    @model_validator(mode="after")
    def _each_column_once(self) -> Self:
        kept = [*self.score_columns, *self.carry]
        if twice := [name for name in kept if kept.count(name) > 1]:
            raise ValueError(f"score_columns and carry name {twice[0]!r} twice: take one of them out")
        named = [self.url_column, self.caption_column, *kept, *self.where]
        if self.columns and (absent := [name for name in named if name not in self.columns]):
            raise ValueError(f"there is no column {absent[0]!r} among columns ({', '.join(self.columns)})")
        return self

    @model_validator(mode="after")
    def _of_a_revision(self) -> Self:
        if self.kind == "hub" and not (self.revision and self.files):
            raise ValueError("kind 'hub' needs 'files' and a pinned 'revision'")
        if self.kind != "hub" and self.revision:
            raise ValueError("'revision' is for kind 'hub': `koala data update` pins the content of others")
        return self

    def recipe(self) -> dict[str, Any]:
        """Return the fields that decide what is made, with the pin's digest in place of all its files."""
        return {**super().recipe(), "pin": self.pin and self.pin.digest}

    @property
    def wanted(self) -> tuple[str, ...]:
        """Return the columns that are read."""
        return tuple(
            dict.fromkeys((self.url_column, self.caption_column, *self.score_columns, *self.carry, *self.where))
        )
