"""Parameters of the data stages."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from koala.config import Config
from koala.data.decode import DecodeConfig
from koala.data.executor import SharedWork
from koala.data.fetch import FetchConfig
from koala.data.forget import Forgotten
from koala.data.rules.base import Rule

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
    "md5",
    "sha256",
    "sha512",
}
"""Columns that img2dataset adds to each sample: no score column may have such a name."""


class SourceConfig(Config, ABC):
    """A list of image URLs and captions. Each kind of list is a subclass."""

    kind: str
    """Kind of list."""
    location: str
    """Where the list is."""
    score_columns: tuple[str, ...] = ()
    """Numeric columns to carry along, for the filter's rule `scores`."""
    rows: int | None = Field(default=None, gt=0)
    """Rows to take at most; all rows if not given."""

    @field_validator("score_columns")
    @classmethod
    def _no_reserved_name(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        if taken := RESERVED_COLUMNS.intersection(columns):
            raise ValueError(f"img2dataset keeps the name {min(taken)!r} for itself; rename the column")
        return columns

    @abstractmethod
    def tables(self, dropped: Counter[str]) -> Iterator[Any]:
        """Yield pyarrow tables of usable rows, `rows` at most: url and caption (string), scores (float64), carried columns.

        Counts the other rows in `dropped`, by reason. Raises KoalaError if the list cannot be read.
        """


class DownloadMachine(FetchConfig, SharedWork):
    """Settings of the download that change its speed and its patience. A change of them fetches nothing again."""

    processes: int = Field(default=1, gt=0)
    """Processes of img2dataset. Each works on one shard at a time."""
    threads: int = Field(default=32, gt=0)
    """Threads of each process. Each fetches one image at a time."""


class DownloadConfig(Config):
    """How img2dataset fetches and resizes images."""

    beside_rows: ClassVar[frozenset[str]] = frozenset({"sidecar"})

    image_size: int = Field(gt=0)
    """Target size in pixels. Larger images are resized to it; smaller ones are left as they are."""
    resize_mode: Literal["keep_ratio", "center_crop", "border", "no"] = "keep_ratio"
    """How a larger image reaches `image_size`. `keep_ratio` applies it to the shorter side."""
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    """Format in which images are stored."""
    encode_quality: int = Field(default=95, ge=0, le=100)
    """Quality of jpg and webp, 0 to 100; compression level of png, 0 to 9."""
    shard_size: int = Field(default=10_000, gt=0)
    """Table rows per shard."""
    allow: tuple[str, ...] = ()
    """`HOST:PORT`s that may be inside your network, such as `127.0.0.1:8765`. All others must have public addresses."""
    decode: DecodeConfig = DecodeConfig()
    """How an image becomes 8-bit RGB."""
    sidecar: tuple[str, ...] = ()
    """Command that runs while the download runs: a proxy, a tunnel, the demo's server. Not part of the resume key."""
    machine: DownloadMachine = DownloadMachine()
    """Settings of speed and patience."""

    @model_validator(mode="after")
    def _quality_fits_format(self) -> "DownloadConfig":
        if self.encode_format == "png" and self.encode_quality > 9:
            raise ValueError("encode_quality of png is its compression: 0 to 9")
        return self

    def resume_key(self) -> dict[str, Any]:
        """Return the recipe without the sidecar: another route to the same images does not restart the download."""
        return self.of_rows(self.recipe())


class FilterMachine(SharedWork):
    """Settings of the filter that change only its speed and memory."""

    processes: int = Field(default=1, gt=0)
    """Shards judged or written at a time."""
    memory_gb: float = Field(default=2.0, ge=0.25)
    """Memory of the tables by which duplicates are found, in GB. What does not fit goes to disk."""


class NearDuplicates(Config):
    """Which images are the same picture though their bytes differ, or their sides are cut off.

    Thumbnails and embeddings propose pairs. Registration, which finds by which scale and shift one image shows the other, confirms
    them.
    """

    thumbnail: float = Field(default=0.85, ge=0.5, le=1)
    """Correlation of a pair's 16 x 16 colour thumbnails from which it is proposed."""
    cosine: float | None = Field(default=0.85, ge=0.5, le=1)
    """Cosine of a pair's embeddings, where the stage `score` keeps them, from which it is proposed too; null: never."""
    registered: float = Field(default=0.992, ge=0.9, le=1)
    """Correlation of a proposed pair from which it is the same picture, over what both show after registration."""


class Quota(Config):
    """How many samples of one value are kept. Drops the others as `quota.COLUMN`, after duplicates."""

    by: str
    """`host` (of the URL), `language` (of the caption, by the rule of that name), or a column that the table carries along."""
    at_most: int = Field(gt=0)
    """Samples of each value that are kept. Those without a value all stay."""
    best: str | None = None
    """Score by which they are chosen, the highest first; in the table's order if not given, and where scores are equal."""


class FilterConfig(Config):
    """Which samples are kept."""

    beside_rows: ClassVar[frozenset[str]] = frozenset(
        {"near_duplicates", "quotas", "hash_lists", "shard_size", "forget"}
    )

    rules: tuple[SerializeAsAny[Rule], ...] = ()
    """Rules in the order in which they apply. A sample is counted under the first rule that it breaks."""
    near_duplicates: NearDuplicates | None = None
    """Of images that show the same picture, keep only the largest; off if not given. Equal bytes and URLs always count as one."""
    quotas: tuple[Quota, ...] = ()
    """Quotas, one after the other: each counts what the ones before it left."""
    hash_lists: tuple[str, ...] = ()
    """Files of hashes whose images are dropped as `forgotten`: a SHA-256 (64 hex digits) or a dHash (16) a line."""
    shard_size: int = Field(default=10_000, gt=0)
    """Samples per shard."""
    forget: tuple[Forgotten, ...] = ()
    """What was taken down: the entries of forget.yaml."""
    machine: FilterMachine = FilterMachine()
    """Settings that change only speed and memory."""

    @model_validator(mode="after")
    def _languages_are_told(self) -> "FilterConfig":
        told = any(rule.kind == "language" for rule in self.rules)
        if not told and any(quota.by == "language" for quota in self.quotas):
            raise ValueError(
                "a quota by language needs the rule `language`, which tells languages: add it to filter.rules"
            )
        return self


class EncodeMachine(SharedWork):
    """Settings of encoding that change only its speed and memory."""

    batch_size: int = Field(default=8, gt=0)
    """Images per forward pass of the VAE."""
    workers: int = Field(default=0, ge=0)
    """Processes that decode images beside each VAE; 0: the VAE's own process does. One decodes about 20 images of 1.5 Mpx/s."""
    processes: int | None = Field(default=None, gt=0)
    """Processes that encode, each its share of the shards; one a GPU if not given, and one where there is none."""


class EncodeConfig(Config):
    """How kept images become latents."""

    buckets: tuple[tuple[int, int], ...] = Field(min_length=1)
    """Bucket sizes (height, width) in pixels, multiples of the VAE's factor (8 for SDXL).

    An image goes to the bucket of the nearest aspect ratio.
    """
    crop: Literal["center", "random"] = "center"
    """Where an image that does not fit its bucket is cropped."""
    flip_probability: float = Field(default=0.0, ge=0, le=1)
    """Probability that an image is mirrored horizontally."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Type in which latents are stored."""
    vae_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Type in which the VAE computes; that of its weights if not given, float32 for one in float16 that overflows there."""
    tile_above: int | None = Field(default=None, gt=0)
    """Pixels of a bucket above which the VAE encodes in overlapping tiles, which takes less memory; never if not given.

    A tile is of the size for which the VAE was trained. The latents differ a little from those of the whole image.
    """
    seed: int = 0
    """Seed of random crops and flips."""
    machine: EncodeMachine = EncodeMachine()
    """Settings that change only speed and memory."""
