"""img2dataset's part of the download, with our own fetching and decoding inside its workers.

    python -m koala.data.workers OPTIONS          # OPTIONS: JSON of `Options`

Its scheduling, resizing, sharding and writing stay. Three of its names are replaced before it starts: how one image is fetched,
how it is decoded before it is resized, and how shards are given to processes.
"""

import functools
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from itertools import islice
from multiprocessing import get_context
from typing import Any

if __name__ in ("__main__", "__mp_main__"):  # here, and in the workers
    # webdataset works without torch: each process starts in half the time and is 200 MB smaller.
    sys.modules["torch"] = None  # type: ignore[assignment]

import img2dataset
from img2dataset import downloader as of_one_shard
from img2dataset.resizer import Resizer
from img2dataset.writer import WebDatasetSampleWriter

from koala.config import Config
from koala.console import say
from koala.data.decode import DecodeConfig, UnusableError, normalised
from koala.data.download import TOLD
from koala.data.fetch import FetchConfig, Fetcher
from koala.errors import DISK_FULL

Row = tuple[int, str]
"""A shard's number and the file of its rows."""


class Options(Config):
    """What the process is told."""

    fetch: FetchConfig
    """How an image is fetched."""
    allow: tuple[str, ...]
    """See DownloadConfig."""
    decode: DecodeConfig
    """How it is decoded."""
    img2dataset: dict[str, Any]
    """The arguments of `img2dataset.download`."""


class Downloader(of_one_shard.Downloader):  # type: ignore[misc]
    """img2dataset's downloader of a shard, which fetches and decodes by our rules."""

    def __init__(self, options: Options, **arguments: Any) -> None:
        """Take img2dataset's arguments."""
        resizer = functools.partial(_resize, options.decode, arguments.pop("resizer"))
        super().__init__(resizer=resizer, **arguments)
        self._options = options

    def __call__(self, row: Row) -> tuple[bool, Row]:
        """Make a shard in a worker process. Return whether it succeeded, and the shard. Raises OSError if the disk is full."""
        self._full = FullDisk()
        self.sample_writer_class = functools.partial(Writer, self._full)
        of_one_shard.download_image_with_retry = functools.partial(
            _fetch, _fetcher(self._options.fetch, self._options.allow), self._full
        )
        found: tuple[bool, Row] = super().__call__(row)
        self._full.check()
        return found

    def download_shard(self, row: Row) -> None:
        """Make a shard."""
        with self._full.noted():
            super().download_shard(row)
        self._full.check()


class FullDisk:
    """The first write of a shard for which there was no space. img2dataset takes it for the fault of one sample."""

    def __init__(self) -> None:
        """Begin with none."""
        self.error: OSError | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Keep an error inside the block that is of this kind."""
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            self.error = error

    def check(self) -> None:
        """Raise the error, if there was one."""
        if self.error:
            raise self.error


class Writer(WebDatasetSampleWriter):  # type: ignore[misc]
    """img2dataset's writer of a shard, which writes nothing more once there is no space."""

    def __init__(self, full: FullDisk, *arguments: Any) -> None:
        """Take img2dataset's arguments."""
        super().__init__(*arguments)
        self._full = full

    def write(self, *sample: Any) -> None:
        """Write a sample, as long as there is space."""
        if self._full.error is None:
            with self._full.noted():
                super().write(*sample)

    def close(self) -> None:
        """End the shard. Raises OSError if there was no space: now no thread of the pool waits any more, and nothing hangs."""
        super().close()
        self._full.check()


@lru_cache(maxsize=1)
def _fetcher(config: FetchConfig, allow: tuple[str, ...]) -> Fetcher:
    """Return the worker's fetcher: what hosts asked for outlives a shard."""
    return Fetcher(config, allow)


def _fetch(
    fetcher: Fetcher, full: FullDisk, row: tuple[int, str], **_: Any
) -> tuple[int, io.BytesIO | None, str | None]:
    key, url = row
    if full.error:
        return key, None, str(full.error)
    content, cause = fetcher.fetch(url)
    return key, None if content is None else io.BytesIO(content), cause


def _resize(config: DecodeConfig, resizer: Resizer, stream: io.BytesIO, boxes: Any = None) -> tuple[Any, ...]:
    """Decode and resize. Return what `Resizer` does: image, four sizes, and a cause of failure."""
    try:
        found: tuple[Any, ...] = resizer(io.BytesIO(normalised(stream.getvalue(), config)), boxes)
    except UnusableError as error:
        return None, None, None, None, None, str(error)
    return found


def distribute(processes: int, downloader: Downloader, reader: Iterable[Row], _: Any, retries: int) -> None:
    """Give shards to worker processes, and none up because a worker was killed.

    A pool of multiprocessing waits for ever for a worker that the system killed for its memory. Here it is noticed: the shards
    that were in work are done again, each alone, so that the one that kills its worker costs no other anything.
    """
    failed = list(_run(processes, downloader, reader))
    for _attempt in range(retries):
        failed = list(_run(processes, downloader, failed))
    if failed:
        _tell(f"{len(failed)} shards failed {retries + 1} times")


def _run(processes: int, downloader: Downloader, rows: Iterable[Row]) -> Iterator[Row]:
    """Make shards; yield those that failed."""
    rows, suspects = iter(rows), list[Row]()
    running: dict[Future[tuple[bool, Row]], Row] = {}
    whole = False
    while not whole:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            try:
                yield from _work(pool, processes, downloader, rows, running)
                whole = True
            except BrokenProcessPool:
                lost = [row for future, row in running.items() if future.exception()]
                _tell(f"a worker was killed: {len(lost)} shards are done again, one by one")
                suspects += lost
                running.clear()
    for row in suspects:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            try:
                succeeded, _ = alone.submit(downloader, row).result()
            except BrokenProcessPool:
                _tell(f"the worker of shard {row[0]} was killed again: it may lack memory")
                succeeded = False
        if not succeeded:
            yield row


def _tell(line: str) -> None:
    """Leave a line for the stage among all that img2dataset prints."""
    say(f"{TOLD}{line}")


def _work(
    pool: ProcessPoolExecutor,
    processes: int,
    downloader: Downloader,
    rows: Iterator[Row],
    running: dict[Future[tuple[bool, Row]], Row],
) -> Iterator[Row]:
    """Keep `running` filled with one shard a process until `rows` end; yield shards that failed."""
    while True:
        running |= {pool.submit(downloader, row): row for row in islice(rows, processes - len(running))}
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            succeeded, row = future.result()
            del running[future]
            if not succeeded:
                yield row


def main(options: Options) -> None:
    """Run img2dataset with our parts."""
    whole = import_module("img2dataset.main")  # the package has a function of that name
    for module, name in (
        (whole, "Downloader"),
        (whole, "multiprocessing_distributor"),
        (of_one_shard, "download_image_with_retry"),
    ):
        if not hasattr(module, name):
            raise RuntimeError(f"this img2dataset has no {module.__name__}.{name}, in whose place ours belongs")
    vars(whole).update(Downloader=functools.partial(Downloader, options), multiprocessing_distributor=distribute)
    try:
        img2dataset.download(**options.img2dataset)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        # The stage learns it by the status: the log may be on the same disk. Python's own end would flush it, and fail.
        os._exit(error.errno)


if __name__ == "__main__":
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    # Under its own name: what is pickled for the workers must not be `__main__`'s.
    ours = import_module("koala.data.workers")
    ours.main(ours.Options.model_validate(json.loads(sys.argv[1])))
