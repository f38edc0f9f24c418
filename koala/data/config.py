"""Parameters of the data stages."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from koala.section import Section

# Names that img2dataset gives to columns of its own.
RESERVED_COLUMNS = {
    "key",
    "url",
    "caption",
    "width",
    "height",
    "original_width",
    "original_height",
    "status",
    "error_message",
    "exif",
    "md5",
    "sha256",
    "sha512",
}


class SourceConfig(Section):
    """Where the URL table comes from.

    kind: `shapes` draws up a table of the project's own pictures (see koala.demo.shapes); `file`, `hub` and `s3` read a
    parquet, CSV or JSON-lines table from disk, from a data set on the Hugging Face Hub, or from S3. With `files`, those
    are read from under `location`, in that order; without, `location` is the table itself.
    """

    kind: Literal["shapes", "file", "hub", "s3"]
    location: str = Field(description="base URL (shapes), path (file), owner/name (hub), s3://bucket/key (s3)")
    files: tuple[str, ...] = ()
    revision: str | None = None
    url_column: str = "url"
    caption_column: str = "caption"
    score_columns: tuple[str, ...] = Field(default=(), description="numbers to carry along, for the filter")
    private_hosts: bool = Field(
        default=False, description="keep URLs that name this machine or a private address: right for a list of your own"
    )
    rows: int | None = Field(default=None, gt=0, description="take this many rows at most")
    seed: int = 0

    @model_validator(mode="after")
    def _complete(self) -> "SourceConfig":
        if self.kind == "hub" and not (self.revision and self.files):
            raise ValueError("kind 'hub' needs 'files' and a pinned 'revision'")
        if self.kind == "shapes" and not self.rows:
            raise ValueError("kind 'shapes' needs 'rows'")
        if taken := RESERVED_COLUMNS.intersection(self.score_columns):
            raise ValueError(f"score_columns: img2dataset keeps the name {min(taken)!r} for itself; rename the column")
        return self


class DownloadConfig(Section):
    """How img2dataset fetches and resizes. Sizes are in pixels, times in seconds."""

    image_size: int = Field(gt=0, description="larger images are brought to this; smaller ones stay as they are")
    resize_mode: Literal["keep_ratio", "center_crop", "border", "no"] = "keep_ratio"
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    encode_quality: int = Field(default=95, ge=0, le=100, description="for png the compression, 0 to 9")
    shard_size: int = Field(default=10_000, gt=0, description="rows of the table a shard")
    processes: int = Field(default=1, gt=0)
    threads: int = Field(default=32, gt=0)
    timeout: int = Field(default=10, gt=0)
    retries: int = Field(default=1, ge=0)
    sidecar: tuple[str, ...] = Field(
        default=(), description="a command kept running while the download runs: a proxy, a tunnel, the demo's server"
    )

    @model_validator(mode="after")
    def _quality_fits_format(self) -> "DownloadConfig":
        if self.encode_format == "png" and self.encode_quality > 9:
            raise ValueError("encode_quality of png is its compression: 0 to 9")
        return self


class FilterConfig(Section):
    """Which samples are kept. Lengths are in words, sizes in pixels of the image before it was resized."""

    min_words: int = Field(default=3, ge=1)
    max_words: int = Field(default=300, ge=1)
    min_size: int = Field(default=0, ge=0, description="shorter side at least")
    max_aspect: float = Field(default=2.0, ge=1, description="longer side over shorter side at most")
    min_ascii: float = Field(default=0.0, ge=0, le=1, description="share of ASCII characters in a caption at least")
    blocklist: tuple[str, ...] = Field(
        default=(), description="regular expressions; a caption that matches one is dropped"
    )
    min_scores: dict[str, float] = Field(default_factory=dict, description="score column -> least value")
    max_scores: dict[str, float] = Field(default_factory=dict, description="score column -> greatest value")
    near_duplicate_bits: int | None = Field(
        default=None,
        ge=0,
        le=15,
        description="drop an image whose 64-bit dHash differs from a kept one's in at most this",
    )
    shard_size: int = Field(default=10_000, gt=0, description="samples a shard")
    processes: int = Field(default=1, gt=0, description="shards judged at a time")

    @field_validator("blocklist")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return patterns


class EncodeConfig(Section):
    """How kept images become latents.

    buckets: (height, width) in pixels; an image goes to the bucket of the nearest aspect ratio. Each a multiple of 8 or
    of whatever the VAE divides by.
    """

    buckets: tuple[tuple[int, int], ...] = Field(min_length=1)
    crop: Literal["center", "random"] = "center"
    flip_probability: float = Field(default=0.0, ge=0, le=1)
    batch_size: int = Field(default=8, gt=0)
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    seed: int = 0
