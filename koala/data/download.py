"""The table's images, fetched and resized by img2dataset into webdataset shards.

The out holds, for each shard, `00000.tar` (samples), `00000.parquet` (how every row ended) and `00000_stats.json`
(img2dataset's counts), and over all of them `stats.json` and `outcomes.png`. Shards are finished one by one under
runs/download/: a run that was killed goes on there.

img2dataset runs in a process of its own (`python -m koala.data.download OPTIONS`), so that its many processes, its
handlers of signals and its talk stay out of ours.
"""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from koala.console import progress, say
from koala.data.config import DownloadConfig
from koala.data.guard import guarded, last_line
from koala.errors import KoalaError
from koala.tracking import hash_tags
from koala.work import finish, resume_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from koala.config import Params
    from koala.tracking import StageRun

STATUSES = ("success", "failed_to_download", "failed_to_resize")
TOP_ERRORS = 20
POLL_SECONDS = 0.2
SIDECAR_SECONDS = 30.0  # a sidecar must be ready by then
MAX_PIXELS = 2**27  # of an image that is decoded: more is a decompression bomb


def run(params: "Params", run: "StageRun") -> None:
    """Fetch the source stage's table.

    Raises KoalaError where no image comes, or where img2dataset or the sidecar fail.
    """
    config = params.download
    source = params.need("source")
    table = source / "table.parquet"
    # What changes how fast the images come does not change which: such work is gone on with.
    settings = config.model_dump(exclude={"processes", "threads", "sidecar"})
    hashes = hash_tags(source=source)
    work = resume_folder("download", config=settings, data=hashes)
    shards = work / "shards"
    shards.mkdir(exist_ok=True)

    run.tags(hashes)
    fetch(table, config, shards, work)
    stats = summarise(shards)
    if not stats["status"]["success"]:
        shutil.rmtree(work)
        raise KoalaError(
            f"none of {stats['rows']} images could be downloaded; mostly: {next(iter(stats['errors']), 'unknown')}"
        )

    (shards / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    figure = plot(stats)
    figure.savefig(shards / "outcomes.png")
    run.metrics({"rows": stats["rows"], "success_share": stats["success_share"]} | stats["status"])
    run.figure(figure, "outcomes.png")
    run.artifact(shards / "stats.json")
    say(f"download: {stats['status']['success']} of {stats['rows']} images ({stats['success_share']:.1%})")
    finish(shards, params.out("download"))
    shutil.rmtree(work)


def fetch(table: Path, config: DownloadConfig, shards: Path, logs: Path) -> None:
    """Bring `shards` to the point where every shard of the table is finished; finished ones are left as they are.

    Raises KoalaError where a process fails, or where a shard does not get finished.
    """
    import pyarrow.parquet as pq

    rows = pq.read_metadata(table).num_rows
    columns = pq.read_schema(table).names
    count = math.ceil(rows / config.shard_size)
    # What a killed run may have left: img2dataset would stumble over a JSON file of another name.
    (shards / "stats.json").unlink(missing_ok=True)
    shutil.rmtree(shards / "_tmp", ignore_errors=True)
    _discard_unfinished(shards)
    done = len(_stats(shards))
    if done == count:
        return
    if done:
        say(f"download: goes on after {done} of {count} shards")
    log = logs / "img2dataset.log"
    command = [sys.executable, "-m", "koala.data.download", json.dumps(_options(table, columns, config, shards))]
    with ExitStack() as stack:
        sidecar = stack.enter_context(_sidecar(config, table, logs) if config.sidecar else nullcontext())
        process = stack.enter_context(guarded(command, log, _environment()))
        finished = _watch(process, sidecar, shards, done, config, logs)
        for _ in progress(finished, f"download: shards of {config.shard_size} rows", total=count, done=done):
            pass
        if process.returncode:
            raise KoalaError(
                f"img2dataset failed: {last_line(log)} (all of it: {log}); run again: finished shards are kept"
            )
    _discard_unfinished(shards, empty=False)
    if lacking := count - len(_stats(shards)):
        raise KoalaError(
            f"{lacking} of {count} shards failed: {last_line(log)} (see {log}); run again: the others are kept"
        )


def _options(table: Path, columns: list[str], config: DownloadConfig, shards: Path) -> dict[str, Any]:
    """The arguments of `img2dataset.download`."""
    return {
        "url_list": str(table),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "save_additional_columns": [column for column in columns if column not in ("url", "caption")] or None,
        "output_folder": str(shards),
        "output_format": "webdataset",
        "number_sample_per_shard": config.shard_size,
        "image_size": config.image_size,
        "resize_mode": config.resize_mode,
        # Whoever needs more pixels than there are resizes once, from the original ones.
        "resize_only_if_bigger": True,
        "encode_format": config.encode_format,
        "encode_quality": config.encode_quality,
        # For the orientation, which resizing loses: the filter drops what was stored turned.
        "extract_exif": True,
        "compute_hash": "sha256",
        "processes_count": config.processes,
        "thread_count": config.threads,
        "timeout": config.timeout,
        "retries": config.retries,
        "incremental_mode": "incremental",
        "max_shard_retry": 1,
        "enable_wandb": False,
    }


def _environment() -> dict[str, str]:
    """No library looks for updates or sends usage data; no proxy is asked for what runs on this machine."""
    direct = ",".join(filter(None, (os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1,localhost")))
    return {
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "WANDB_MODE": "disabled",
        "OPENCV_IO_MAX_IMAGE_PIXELS": str(MAX_PIXELS),
        "no_proxy": direct,
        "NO_PROXY": direct,
    }


# The command that runs beside.


@contextmanager
def _sidecar(config: DownloadConfig, table: Path, logs: Path) -> Iterator[subprocess.Popen]:
    """Run the sidecar; ready as soon as the host of the table's first URL accepts connections."""
    host, port = _first_host(table)
    log = logs / "sidecar.log"
    with guarded(config.sidecar, log) as process:
        deadline = time.monotonic() + SIDECAR_SECONDS
        while not _accepts(host, port):
            _check_sidecar(process, log)
            if time.monotonic() > deadline:
                raise KoalaError(
                    f"download.sidecar runs, but {host}:{port} accepts no connection: {last_line(log)} (see {log})"
                )
            time.sleep(POLL_SECONDS / 4)
        yield process


def _check_sidecar(process: subprocess.Popen, log: Path) -> None:
    if process.poll() is not None:
        raise KoalaError(f"download.sidecar ended: {last_line(log).removeprefix('koala: ')}")


def _first_host(table: Path) -> tuple[str, int]:
    import pyarrow.parquet as pq

    first = next(pq.ParquetFile(table).iter_batches(batch_size=1, columns=["url"]))
    url = urlsplit(first["url"][0].as_py())
    return url.hostname or "", url.port or {"http": 80, "https": 443}[url.scheme]


def _accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


# Watching img2dataset.


def _watch(
    process: subprocess.Popen,
    sidecar: subprocess.Popen | None,
    shards: Path,
    done: int,
    config: DownloadConfig,
    logs: Path,
) -> Iterator[None]:
    """Yield once for each shard that gets finished, until the process ends.

    Raises KoalaError where the sidecar ends (the rows after it would all fail), or where img2dataset stands still: it
    waits for ever for a worker that was killed, for want of memory say.
    """
    patience = 300 + 400 * config.timeout * (config.retries + 1) / config.threads
    last, moved = _footprint(shards), time.monotonic()
    ended = False
    while not ended:
        ended = process.poll() is not None
        now_done = len(_stats(shards))
        yield from (None for _ in range(done, now_done))
        done = now_done
        if sidecar and not ended:
            _check_sidecar(sidecar, logs / "sidecar.log")
        if (footprint := _footprint(shards)) != last:
            last, moved = footprint, time.monotonic()
        elif time.monotonic() - moved > patience:
            raise KoalaError(
                f"img2dataset has stood still for {patience:.0f} s (see {logs}): run again, it goes on from here"
            )
        if not ended:
            time.sleep(POLL_SECONDS)


def _footprint(shards: Path) -> tuple[int, int]:
    """Files and bytes there are: they grow as long as images come."""
    sizes = [entry.stat().st_size for entry in os.scandir(shards)]
    return len(sizes), sum(sizes)


def _stats(shards: Path) -> dict[str, dict[str, Any]]:
    """What img2dataset counted, for the finished shards. A file that is just being written counts as not there."""
    found = {}
    for file in sorted(shards.glob("*_stats.json")):
        try:
            found[file.name.removesuffix("_stats.json")] = json.loads(file.read_text())
        except json.JSONDecodeError:
            continue
    return found


def _discard_unfinished(shards: Path, empty: bool = True) -> None:
    """Remove the stats of shards that are to be done again: img2dataset holds whatever has a stats file for done.

    That is a stats file cut short, a shard that lost rows (a full disk), and, where `empty`, one without a single image
    (a network that was down).
    """
    import pyarrow.parquet as pq

    whole = _stats(shards)
    for file in shards.glob("*_stats.json"):
        shard = file.name.removesuffix("_stats.json")
        stats = whole.get(shard)
        if (
            stats is None
            or pq.read_metadata(shards / f"{shard}.parquet").num_rows != stats["count"]
            or (empty and not stats["successes"])
        ):
            file.unlink()


# What came of it.


def summarise(shards: Path) -> dict[str, Any]:
    """Rows by status, the share that succeeded, and the most frequent error messages with their counts."""
    status: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for stats in _stats(shards).values():
        status.update(
            success=stats["successes"],
            failed_to_download=stats["failed_to_download"],
            failed_to_resize=stats["failed_to_resize"],
        )
        for message, count in stats["status_dict"].items():
            if message != "success":
                errors[_kind_of_error(message)] += count
    rows = sum(status.values())
    return {
        "rows": rows,
        "success_share": round(status["success"] / max(rows, 1), 6),
        "status": {name: status[name] for name in STATUSES},
        "errors": dict(sorted(errors.items(), key=lambda item: (-item[1], item[0]))[:TOP_ERRORS]),
    }


def _kind_of_error(message: str) -> str:
    """A message without what differs from one picture to the next, and without what a terminal would obey."""
    text = re.sub(r"(?<!Error )(?<!Errno )\b\d+\b", "N", message)
    return "".join(character for character in text if character.isprintable())[:80]


def plot(stats: dict[str, Any]) -> "Figure":
    """Bars: the images that came, and the others by error message."""
    from koala.data.plots import bars

    return bars({"success": stats["status"]["success"]} | stats["errors"], "rows", f"{stats['rows']} rows of the table")


if __name__ in ("__main__", "__mp_main__"):  # here, and in the processes that img2dataset spawns
    # webdataset does without torch where there is none: each process starts in half the time and is 200 MB smaller.
    sys.modules["torch"] = None  # type: ignore[assignment]

if __name__ == "__main__":
    from img2dataset import download

    download(**json.loads(sys.argv[1]))
