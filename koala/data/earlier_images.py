"""What an earlier download knows of URLs: images that came, and failures that another request would repeat."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from koala.data import earlier
from koala.data.executor import each
from koala.data.fetch import is_final
from koala.data.shards import Span
from koala.data.shards import index as places_of

_SIZES = ("width", "height", "original_width", "original_height")


@dataclass(frozen=True)
class Held:
    """What is known of a URL."""

    status: str
    """`success`, `failed_to_download` or `failed_to_resize`."""
    cause: str | None
    """Why it failed."""
    sizes: tuple[int, int, int, int]
    """Width and height of the stored image, then of the fetched one; of an image that came."""
    sha256: str | None
    """Hash of the fetched file."""
    exif: str | None
    """EXIF data of the fetched file as JSON."""
    place: tuple[Path, Span]
    """The shard that holds the stored image, and where."""

    def image(self) -> bytes:
        """Read the stored image."""
        file, (offset, size) = self.place
        with file.open("rb") as shard:
            shard.seek(offset)
            return shard.read(size)


class EarlierImages:
    """Outcomes of an earlier download by URL."""

    def __init__(self, folder: Path, index: Path) -> None:
        """Name the folder of shards, and its index."""
        self._folder = folder
        self._rows = earlier.Rows(index)

    def of(self, urls: Collection[str]) -> dict[str, Held]:
        """Return what is known of some URLs."""
        keys = {_key(url): url for url in urls}
        found = {}
        for key, (status, cause, sizes, sha256, exif, shard, span) in self._rows.find(keys).items():
            place = (self._folder / f"{shard}.tar", (span[0], span[1]))
            found[keys[key]] = Held(status, cause, (sizes[0], sizes[1], sizes[2], sizes[3]), sha256, exif, place)
        return found


def index_images(out: Path, file: Path, processes: int) -> Path | None:
    """Index what an earlier run has downloaded, and return its folder, if there is such a run.

    Its files are read once, and verified.
    """
    folder = earlier.find(out)
    if folder is None:
        return None
    tables = sorted(folder.glob("*.parquet"))
    with each(partial(_rows_of, folder), tables, processes) as described:
        earlier.index(file, described)
    return folder.resolve()


def _rows_of(folder: Path, table: Path) -> Mapping[bytes, Any]:
    """Return what a shard knows of its URLs; nothing if it is not as its manifest says."""
    shard = folder / f"{table.stem}.tar"
    if not earlier.is_intact(table, shard):
        return {}
    images = {place.key: place.image for place in places_of(shard)}
    columns = ["url", "key", "status", "error_message", *_SIZES, "sha256", "exif"]
    found = {}
    for row in pq.read_table(table, columns=columns).to_pylist():
        came = row["status"] == "success"
        if came and row["key"] not in images:
            continue
        if row["status"] == "failed_to_download" and not is_final(row["error_message"]):
            continue
        sizes = [row[name] or 0 for name in _SIZES]
        span = images[row["key"]] if came else (0, 0)
        found[_key(row["url"])] = [
            row["status"],
            row["error_message"],
            sizes,
            row["sha256"],
            row["exif"],
            table.stem,
            span,
        ]
    return found


def _key(url: str) -> bytes:
    return hashlib.sha256(url.encode(errors="surrogatepass")).digest()
