"""The stage `download`: the table's images, fetched and resized by img2dataset into webdataset shards.

For each shard, `out` gets `00000.tar` (samples), `00000.parquet` (outcome of every row) and `00000_stats.json`
(counts); for all of them stats.json and outcomes.png. img2dataset works in `out/state/shards`. A killed run
resumes after the last finished shard. Outcomes that an earlier run knows by URL (koala.data.earlier) are taken over. Equal
outcomes give equal bytes.

img2dataset runs in a separate process (koala.data.workers), which keeps its child processes, signal handlers and output away
from ours.
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
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from koala.console import progress, say
from koala.data import earlier, manifest
from koala.data.config import DownloadConfig
from koala.data.earlier_images import index_images
from koala.data.fetch import FetchConfig
from koala.data.parquet import named
from koala.data.worker_options import WorkerOptions
from koala.errors import DISK_FULL, KoalaError
from koala.process import guarded, last_line
from koala.run import STATE, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROWING = (".waiting", ".part")
"""Endings of the files of shards in work: images that wait for the shard's last, and the shard that is being written."""
STATUSES = ("success", "failed_to_download", "failed_to_resize")
TOP_ERRORS = 20
TOLD = "koala: "
"""What a line begins with that a worker leaves for us in img2dataset's log."""
FINISHED = "finished"
"""File among the shards in which img2dataset's process notes each that is finished, by its number, a line each."""
NO_CALLS_HOME = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
"""Environment of img2dataset's processes: without update checks and telemetry."""
POLL_SECONDS = 0.2
LOOK_SECONDS = 10.0
"""Time between looks through the folder for work that grows."""
SIDECAR_SECONDS = 30.0
"""Time in which a sidecar must accept connections."""
_SHARD_FILE = re.compile(r"\d+(\.tar|\.parquet|_stats\.json)")


def download(config: DownloadConfig, table: Path, out: Path, run: Run) -> None:
    """Fetch the images of `table` into shards in `out`.

    Raises KoalaError if no image comes, or if img2dataset or the sidecar fails.
    """
    manifest.check(table)
    state = out / STATE
    # img2dataset needs its own folder: it takes every JSON file there for the stats of a shard.
    shards = state / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    _move_shards(out, shards)
    index = state / earlier.INDEX
    folder = index_images(out, index, config.machine.processes)
    fetch(table, config, shards, state, (folder, index) if folder else None)
    stats, reused = summarise(shards), earlier.reused(shards)
    if not stats["status"]["success"]:
        raise KoalaError(
            f"none of {stats['rows']} images could be downloaded; mostly: {next(iter(stats['errors']), 'unknown')}"
        )

    for shard, counts in _stats(shards).items():
        if (kept := _without_times(counts)) != counts:
            (shards / f"{shard}_stats.json").write_text(json.dumps(kept, indent=1) + "\n")
    _move_shards(shards, out)
    (out / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    figure = plot(stats)
    figure.savefig(out / "outcomes.png")
    run.metrics({"rows": stats["rows"], "success_share": stats["success_share"]} | stats["status"])
    run.metrics({"reused": reused, "new": stats["rows"] - reused})
    run.figure(figure, "outcomes.png")
    run.artifact(out / "stats.json")
    manifest.write(out)
    say(
        f"download: {stats['status']['success']} of {stats['rows']} images ({stats['success_share']:.1%}), "
        f"{reused} of the rows taken over from the last run"
    )
    shutil.rmtree(state)


def _without_times(counts: dict[str, Any]) -> dict[str, Any]:
    """Return what img2dataset counted of a shard, without when and how long."""
    kept = ("count", "successes", "failed_to_download", "failed_to_resize")
    return {name: counts[name] for name in kept} | {"status_dict": dict(sorted(counts["status_dict"].items()))}


def _move_shards(source: Path, target: Path) -> None:
    for file in source.iterdir():
        if _SHARD_FILE.fullmatch(file.name):
            os.replace(file, target / file.name)


def fetch(
    table: Path, config: DownloadConfig, shards: Path, logs: Path, known: tuple[Path, Path] | None = None
) -> None:
    """Fetch every shard of the table (a folder of parts) that is not finished in the folder `shards`.

    `known` are the folder of an earlier run and its index.

    Raises KoalaError if a process fails or a shard stays unfinished, OSError if the disk is full.
    """
    parts, columns = _parts(table)
    # img2dataset shards each part by itself: the last shard of one may be smaller.
    rows, count = sum(parts.values()), sum(math.ceil(rows / config.shard_size) for rows in parts.values())
    shutil.rmtree(shards / "_tmp", ignore_errors=True)
    _discard_unfinished(shards)
    finished = _stats(shards)
    if len(finished) == count:
        return
    if finished:
        say(f"download: resumes after {len(finished)} of {count} shards")
    log = logs / "img2dataset.log"
    (shards / FINISHED).write_text("")
    options = _options(table, columns, config, shards, known)
    command = [sys.executable, "-m", "koala.data.workers", options.model_dump_json()]
    with ExitStack() as stack:
        helper = stack.enter_context(sidecar(config, _first_url(table), logs) if config.sidecar else nullcontext())
        process = stack.enter_context(guarded(command, log, NO_CALLS_HOME))
        rows_done = sum(stats["count"] for stats in finished.values())
        fetched = _watch(process, helper, shards, config, logs)
        for _ in progress(fetched, "download", total=rows, done=rows_done, unit="images", size=int):
            pass
        if process.returncode in DISK_FULL:
            raise OSError(process.returncode, os.strerror(process.returncode), str(shards))
        told = _told(log)
        for line in told:
            say(f"download: {line}")
        if process.returncode:
            raise KoalaError(
                f"img2dataset failed: {last_line(log)} (all of it: {log}); run again: finished shards are kept"
            )
    _discard_unfinished(shards, empty=False)
    if lacking := count - len(_stats(shards)):
        raise KoalaError(
            f"{lacking} of {count} shards failed: {told[-1] if told else last_line(log)} (see {log}); "
            "run again: the others are kept"
        )


def _parts(table: Path) -> tuple[dict[Path, int], list[str]]:
    """Return the rows of each part of the table, and its columns. Raises KoalaError if there is no part, or one is broken."""
    import pyarrow.parquet as pq

    parts, columns = {}, list[str]()
    for file in sorted(table.glob("*.parquet")):
        with named(file):
            found = pq.read_metadata(file)
        parts[file], columns = found.num_rows, columns or found.schema.to_arrow_schema().names
        if lacking := [column for column in ("url", "caption") if column not in found.schema.names]:
            raise KoalaError(f"{file} has no column {lacking[0]!r}: it is no part of a table; make the table again")
    if not parts:
        raise KoalaError(f"{table} has no part-00000.parquet: make the table again")
    return parts, columns


def _told(log: Path) -> list[str]:
    """Return what workers left for us."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return [line.removeprefix(TOLD) for line in lines if line.startswith(TOLD)]


def _options(
    table: Path, columns: list[str], config: DownloadConfig, shards: Path, known: tuple[Path, Path] | None
) -> WorkerOptions:
    arguments = {
        "url_list": str(table),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "save_additional_columns": [column for column in columns if column not in ("url", "caption")] or None,
        "output_folder": str(shards.resolve()),  # a cluster's workers have another current folder
        "output_format": "webdataset",
        "number_sample_per_shard": config.shard_size,
        "image_size": config.image_size,
        "resize_mode": config.resize_mode,
        # Upscaling here would mean resizing twice: `encode` resizes to its buckets.
        "resize_only_if_bigger": True,
        "encode_format": config.encode_format,
        "encode_quality": config.encode_quality,
        "compute_hash": "sha256",
        "processes_count": config.machine.processes,
        "thread_count": config.machine.threads,
        "incremental_mode": "incremental",
        "max_shard_retry": 1,
        "enable_wandb": False,
    }
    return WorkerOptions(
        engine=config.machine.engine,
        fetch=FetchConfig(**config.machine.model_dump(include=set(FetchConfig.model_fields))),
        allow=config.allow,
        decode=config.decode,
        earlier=(known[0].resolve(), known[1].resolve()) if known else None,
        img2dataset=arguments,
    )


# The sidecar.


@contextmanager
def sidecar(config: DownloadConfig, first_url: str, logs: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the sidecar inside the block, once the host of the table's first URL accepts connections."""
    url = urlsplit(first_url)
    host, port = url.hostname or "", url.port or {"http": 80, "https": 443}[url.scheme]
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


def _check_sidecar(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.poll() is not None:
        raise KoalaError(f"download.sidecar ended: {last_line(log).removeprefix('koala: ')}")


def _first_url(table: Path) -> str:
    import pyarrow.parquet as pq

    part = min(table.glob("*.parquet"))
    first = next(pq.ParquetFile(part).iter_batches(batch_size=1, columns=["url"]))
    return str(first["url"][0])


def _accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


# Watching img2dataset.


def _watch(
    process: subprocess.Popen[bytes],
    sidecar: subprocess.Popen[bytes] | None,
    shards: Path,
    config: DownloadConfig,
    logs: Path,
) -> Iterator[int]:
    """Yield the rows of each shard that is finished from now on, until the process ends.

    Raises KoalaError if the sidecar ends, since all later rows would fail, or if img2dataset makes no progress.
    """
    machine = config.machine
    patience = 300 + 400 * machine.deadline * (machine.retries + 1) / machine.threads
    last, moved = _footprint(shards), time.monotonic()
    looked = moved
    ended = False
    with (shards / FINISHED).open() as finished:
        while not ended:
            ended = process.poll() is not None
            for number in finished:
                yield _count(shards / f"{int(number):05d}_stats.json")
            if sidecar and not ended:
                _check_sidecar(sidecar, logs / "sidecar.log")
            if (now := time.monotonic()) - looked > LOOK_SECONDS:
                looked = now
                if (footprint := _footprint(shards)) != last:
                    last, moved = footprint, now
                elif now - moved > patience:
                    raise KoalaError(
                        f"img2dataset has stood still for {patience:.0f} s (see {logs}): run again to resume"
                    )
            if not ended:
                time.sleep(POLL_SECONDS)


def _footprint(shards: Path) -> tuple[int, int]:
    """Return the number of files, and the bytes of unfinished shards: they grow as long as images arrive."""
    files = list(os.scandir(shards))
    size = 0
    for file in files:
        if file.name.endswith(GROWING):
            with suppress(FileNotFoundError):  # it is finished by now
                size += file.stat().st_size
    return len(files), size


def _count(stats: Path) -> int:
    """Return the rows of a finished shard; none, where the file of another machine is not seen yet."""
    try:
        return int(json.loads(stats.read_text())["count"])
    except (OSError, json.JSONDecodeError):
        return 0


def _stats(shards: Path) -> dict[str, dict[str, Any]]:
    """Return img2dataset's counts of each finished shard. A file that is still being written is ignored."""
    found = {}
    for file in sorted(shards.glob("*_stats.json")):
        try:
            found[file.name.removesuffix("_stats.json")] = json.loads(file.read_text())
        except json.JSONDecodeError:
            continue
    return found


def _discard_unfinished(shards: Path, empty: bool = True) -> None:
    """Remove the stats file of shards that must be fetched again: img2dataset skips shards that have one.

    Those are shards with a truncated stats file, shards that lost rows or images (full disk, power cut) and, if `empty`,
    shards without a single image (network down).
    """
    readable = _stats(shards)
    for file in shards.glob("*_stats.json"):
        shard = file.name.removesuffix("_stats.json")
        stats = readable.get(shard)
        if stats is None or (empty and not stats["successes"]) or not _is_whole(shards, shard, stats["count"]):
            file.unlink()


def _is_whole(shards: Path, shard: str, rows: int) -> bool:
    """Return whether a finished shard holds the rows and images that img2dataset counted; say what is wrong with it."""
    import pyarrow.parquet as pq

    try:
        with named(shards / f"{shard}.parquet"):
            found = pq.read_metadata(shards / f"{shard}.parquet").num_rows
        manifest.check_count(shards / f"{shard}.tar", shards / f"{shard}_stats.json")
    except KoalaError as error:
        say(f"download: shard {shard} must be fetched again: {error}")
        return False
    return bool(found == rows)


# The summary.


def summarise(shards: Path) -> dict[str, Any]:
    """Return the number of rows by status, the share that succeeded, and the most frequent errors with their counts."""
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
    """Normalise a cause for counting: digits but a status become N, control characters are removed."""
    text = re.sub(r"(?<!status )\b\d+\b", "N", message)
    return "".join(character for character in text if character.isprintable())[:80]


def plot(stats: dict[str, Any]) -> "Figure":
    """Plot images downloaded, and failures by error message."""
    from koala.plots import bars

    return bars({"success": stats["status"]["success"]} | stats["errors"], "rows", f"{stats['rows']} rows of the table")
