"""img2dataset's part of the download, with our own fetching and decoding inside its workers.

    python -m koala.data.workers OPTIONS          # OPTIONS: JSON of `WorkerOptions`

Its scheduling, resizing and sharding stay. Replaced are how the table is read, how one image is fetched, how it is decoded
before it is resized, how a shard is written, and how shards are given to processes. What an earlier run knows of a URL goes
through it as a fetched image does, but is neither fetched nor resized again.
"""

import functools
import io
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import IO, Any

if __name__ in ("__main__", "__mp_main__"):  # here, and in the workers
    # webdataset works without torch, and nothing is sent to wandb: each process starts in half the time and is smaller by 200 MB.
    sys.modules["torch"] = None  # type: ignore[assignment]
    sys.modules["wandb"] = ModuleType("wandb")

import img2dataset
import pyarrow as pa
import pyarrow.parquet as pq
from img2dataset import downloader as of_one_shard
from img2dataset.resizer import Resizer

from koala.console import say
from koala.data import earlier
from koala.data.decode import DecodeConfig, UnusableError, normalised
from koala.data.download import FINISHED, NO_CALLS_HOME, TOLD
from koala.data.earlier_images import EarlierImages, Held
from koala.data.executor import Engine, cluster
from koala.data.fetch import FetchConfig, Fetcher
from koala.data.shard_rows import ShardRows
from koala.data.shards import Sample, write_shard
from koala.data.worker_options import WorkerOptions
from koala.errors import DISK_FULL

Row = tuple[int, str]
"""A shard's number and the file of its rows."""


class Downloader(of_one_shard.Downloader):  # type: ignore[misc]
    """img2dataset's downloader of a shard, which fetches and decodes by our rules."""

    def __init__(self, options: WorkerOptions, **arguments: Any) -> None:
        """Take img2dataset's arguments."""
        resizer = functools.partial(_resize, options.decode, arguments.pop("resizer"))
        super().__init__(resizer=resizer, **arguments)
        self._options = options

    def __call__(self, row: Row) -> tuple[bool, Row]:
        """Make a shard in a worker process. Return whether it succeeded, and the shard. Raises OSError if the disk is full.

        A shard's counts are written and its rows removed last. One that is whole comes again where a process of the pool was
        killed before the pool was told.
        """
        counts = Path(self.output_folder, f"{row[0]:0{self.oom_shard_count}d}_stats.json")
        if counts.exists() and not Path(row[1]).exists():
            return True, row
        self._full = FullDisk()
        held = _held(self._options.earlier, Path(row[1]))
        self.sample_writer_class = functools.partial(Writer, held, self._full)
        of_one_shard.download_image_with_retry = functools.partial(
            _fetch, _fetcher(self._options.fetch, self._options.allow), held, self._full
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


class _Known(io.BytesIO):
    """Stands for the file of a URL of which the outcome is known."""

    def __init__(self, held: Held) -> None:
        super().__init__()
        self.held = held


class Writer:
    """Writes a shard's tar and parquet file when all its rows are there, in their order: equal rows give equal bytes.

    Rows come as the network gives them. Their images wait in a file beside the shard.
    """

    def __init__(
        self,
        held: Mapping[str, Held],
        full: FullDisk,
        shard_id: int,
        output_folder: str,
        save_caption: bool,
        oom_shard_count: int,
        schema: pa.Schema,
        encode_format: str,
    ) -> None:
        """Take img2dataset's arguments, what is known of URLs, and where a full disk is noted."""
        self._held, self._full = held, full
        self._folder, self._name = Path(output_folder), f"{shard_id:0{oom_shard_count}d}"
        self._schema, self._extension = schema, encode_format
        self._waiting: IO[bytes] = (self._folder / f"{self._name}.waiting").open("w+b")
        self._rows: dict[str, tuple[dict[str, Any], int, int]] = {}

    def write(self, image: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        """Take a row; of one that failed there is no image. Nothing more is written once there is no space."""
        if self._full.error:
            return
        if image is not None and (held := self._held.get(meta["url"])):
            meta |= {"sha256": held.sha256, "exif": held.exif}
        start = self._waiting.tell()
        with self._full.noted():
            self._waiting.write(image or b"")
        self._rows[key] = (meta, start, self._waiting.tell() - start if image is not None else -1)

    def close(self) -> None:
        """Write the shard. Raises OSError if there was no space: now no thread of the pool waits any more, and nothing hangs."""
        with self._full.noted():
            self._waiting.flush()
        self._full.check()
        rows = [self._rows[key][0] for key in sorted(self._rows)]
        pq.write_table(pa.Table.from_pylist(rows, self._schema), self._folder / f"{self._name}.parquet")
        write_shard(self._folder / f"{self._name}.tar", self._samples(), self._folder / f"{self._name}.part")
        self._waiting.close()
        Path(self._waiting.name).unlink()
        earlier.note_reused(self._folder, self._name, sum(row["url"] in self._held for row in rows))

    def _samples(self) -> Iterator[Sample]:
        for key, (meta, start, size) in sorted(self._rows.items()):
            if size >= 0:
                self._waiting.seek(start)
                yield Sample(key, self._waiting.read(size), self._extension, meta["caption"] or "", meta)


def _held(known: tuple[Path, Path] | None, rows: Path) -> dict[str, Held]:
    """Return what is known of the URLs of a shard, whose rows are in an Arrow file."""
    if known is None:
        return {}
    with pa.memory_map(str(rows)) as file:
        urls = pa.ipc.open_file(file).read_all()["url"].to_pylist()
    return EarlierImages(*known).of(urls)


@lru_cache(maxsize=1)
def _fetcher(config: FetchConfig, allow: tuple[str, ...]) -> Fetcher:
    """Return the worker's fetcher: what hosts asked for outlives a shard."""
    return Fetcher(config, allow)


def _fetch(
    fetcher: Fetcher, held: Mapping[str, Held], full: FullDisk, row: tuple[int, str], **_: Any
) -> tuple[int, io.BytesIO | None, str | None]:
    key, url = row
    if known := held.get(url):
        return (key, None, known.cause) if known.status == "failed_to_download" else (key, _Known(known), None)
    if full.error:
        return key, None, str(full.error)
    try:
        content, cause = fetcher.fetch(url)
    except Exception as error:  # nothing is known to raise; img2dataset would wait for this row for ever
        return key, None, f"{type(error).__name__} while it was fetched"
    return key, None if content is None else io.BytesIO(content), cause


def _resize(config: DecodeConfig, resizer: Resizer, stream: io.BytesIO, boxes: Any = None) -> tuple[Any, ...]:
    """Decode and resize. Return what `Resizer` does: image, four sizes, and a cause of failure."""
    if isinstance(stream, _Known):
        held = stream.held
        return (None, None, None, None, None, held.cause) if held.cause else (held.image(), *held.sizes, None)
    try:
        found: tuple[Any, ...] = resizer(io.BytesIO(normalised(stream.getvalue(), config)), boxes)
    except UnusableError as error:
        return None, None, None, None, None, str(error)
    return found


class NoLogger:
    """Stands for img2dataset's process that reads every shard's counts again and again: the stage does so itself."""

    done_shards: Collection[int]

    def __init__(self, *_: Any) -> None:
        """Take what img2dataset gives."""

    def start(self) -> None:
        """Start nothing."""

    def join(self) -> None:
        """Wait for nothing."""

    def terminate(self) -> None:
        """End nothing."""


def distribute(
    engine: Engine, processes: int, downloader: Downloader, reader: Iterable[Row], _: Any, retries: int
) -> None:
    """Give shards to worker processes, and none up because a worker was killed; note each that is finished for the stage."""
    run = _run_on_ray if engine == "ray" else _run
    rows = reader
    with Path(downloader.output_folder, FINISHED).open("a", buffering=1) as finished:
        for _attempt in range(retries + 1):
            failed = []
            for row, succeeded in run(processes, downloader, rows):
                if succeeded:
                    finished.write(f"{row[0]}\n")
                else:
                    failed.append(row)
            rows = failed
    if failed:
        _tell(f"{len(failed)} shards failed {retries + 1} times")


def _run_on_ray(processes: int, downloader: Downloader, rows: Iterable[Row]) -> Iterator[tuple[Row, bool]]:
    """Make shards on a cluster, `processes` at a time; yield each, and whether it succeeded.

    img2dataset's own distributor for Ray starts a task for every shard of the table at once, and ignores which of them failed.
    """
    ray = cluster()
    make = ray.remote(num_cpus=1, max_retries=0, runtime_env={"env_vars": NO_CALLS_HOME})(_make)
    shared, rows = ray.put(downloader), iter(rows)
    running: dict[Any, Row] = {}
    while True:
        running |= {make.remote(shared, row): row for row in islice(rows, processes - len(running))}
        if not running:
            return
        (done,), _ = ray.wait(list(running))
        row = running.pop(done)
        try:
            succeeded = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError:
            _tell(f"the worker of shard {row[0]} was lost on the cluster: it may lack memory")
            succeeded = False
        yield row, succeeded


def _make(downloader: Downloader, row: Row) -> bool:
    return downloader(row)[0]


def _run(processes: int, downloader: Downloader, rows: Iterable[Row]) -> Iterator[tuple[Row, bool]]:
    """Make shards in processes of this machine; yield each, and whether it succeeded.

    A pool of multiprocessing waits for ever for a worker that the system killed for its memory. Here it is noticed: the shards
    that were in work are done again, each alone, so that the one that kills its worker costs no other anything.
    """
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
        yield row, succeeded


def _tell(line: str) -> None:
    """Leave a line for the stage among all that img2dataset prints."""
    say(f"{TOLD}{line}")


def _work(
    pool: ProcessPoolExecutor,
    processes: int,
    downloader: Downloader,
    rows: Iterator[Row],
    running: dict[Future[tuple[bool, Row]], Row],
) -> Iterator[tuple[Row, bool]]:
    """Keep `running` filled with one shard a process until `rows` end; yield each, and whether it succeeded."""
    while True:
        running |= {pool.submit(downloader, row): row for row in islice(rows, processes - len(running))}
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            succeeded, row = future.result()
            del running[future]
            yield row, succeeded


def main(options: WorkerOptions) -> None:
    """Run img2dataset with our parts."""
    whole = import_module("img2dataset.main")  # the package has a function of that name
    for module, name in (
        (whole, "Downloader"),
        (whole, "LoggerProcess"),
        (whole, "Reader"),
        (whole, "multiprocessing_distributor"),
        (of_one_shard, "download_image_with_retry"),
    ):
        if not hasattr(module, name):
            raise RuntimeError(f"this img2dataset has no {module.__name__}.{name}, in whose place ours belongs")
    vars(whole).update(
        Downloader=functools.partial(Downloader, options),
        LoggerProcess=NoLogger,
        Reader=ShardRows,
        multiprocessing_distributor=functools.partial(distribute, options.engine),
    )
    try:
        img2dataset.download(**options.img2dataset)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        # The stage learns it by the status: the log may be on the same disk. Python's own end would flush it, and fail.
        os._exit(error.errno)


if __name__ == "__main__":
    os.environ |= NO_CALLS_HOME
    # Under its own name: what is pickled for the workers must not be `__main__`'s.
    ours = import_module("koala.data.workers")
    ours.main(WorkerOptions.model_validate_json(sys.argv[1]))
