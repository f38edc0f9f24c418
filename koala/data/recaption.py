"""The stage `recaption`: new captions of kept images by an image-to-text model. The old ones stay with the images.

A shard NAME.tar becomes NAME.parquet, see COLUMNS; a row of an image without a new caption has a null. A shard is finished when its
parquet file is in `out`: a killed run resumes after it. How training mixes both captions: koala.data.captions.mixed.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from koala.console import progress
from koala.data import manifest
from koala.data.ahead import batches_ahead
from koala.data.captions.config import RecaptionConfig
from koala.data.executor import share, use_gpu
from koala.data.picture import open_picture
from koala.data.shards import Sample, read_shard, shards
from koala.errors import KoalaError
from koala.run import STATE, Run

COLUMNS = pa.schema(
    {
        "key": pa.string(),
        "caption": pa.string(),  # null where the image cannot be decoded, or the model says nothing
        "model": pa.string(),  # repository or folder, @, commit
    }
)


def recaption(config: RecaptionConfig, kept: Path, out: Path, run: Run) -> None:
    """Caption every image of `kept`; shards already in `out` are left as they are. Without a model there is nothing to do.

    Raises KoalaError if there are no shards, or the model cannot be had.
    """
    stats: dict[str, Any] = {"samples": 0, "captioned": 0, "words": 0.0}
    if config.model is not None:
        files = shards(kept)
        if not files:
            raise KoalaError(f"{kept} holds no shards (.tar): run `dvc repro filter` again")
        manifest.check(kept)
        manifest.resume(out, config, kept)
        pending = [file for file in files if not (out / f"{file.stem}.parquet").is_file()]
        work, machine = partial(_caption_shards, config, out), config.machine
        with share(work, pending, machine.processes, machine.engine) as finished:
            for _ in progress(finished, "recaption: shards", total=len(files), done=len(files) - len(pending)):
                pass
        stats = _summary([out / f"{file.stem}.parquet" for file in files])
    (out / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    run.metrics(stats)
    manifest.write(out, *([kept] if config.model else []))
    shutil.rmtree(out / STATE, ignore_errors=True)


def _caption_shards(config: RecaptionConfig, out: Path, files: Sequence[Path], rank: int) -> Iterator[Path]:
    """Caption shards with a model of this process's own, on the GPU of its rank. Yield each that is finished."""
    from koala.data.captions.captioner import Captioner

    use_gpu(rank)
    captioner = Captioner(config)
    with ThreadPoolExecutor(config.machine.threads) as threads:

        def start(samples: Sequence[Sample]) -> list[tuple[Sample, Future[Image.Image | None]]]:
            return [(sample, threads.submit(open_picture, sample.image)) for sample in samples]

        for file in files:
            manifest.verify(file)
            rows: list[dict[str, str | None]] = []
            for batch in batches_ahead(read_shard(file), config.machine.batch_size, start):
                images = {sample.key: image for sample, decoded in batch if (image := decoded.result()) is not None}
                said = dict(zip(images, captioner.captions(list(images.values())), strict=True)) if images else {}
                model = f"{config.model}@{config.revision}" if config.revision else config.model
                rows += [{"key": each.key, "caption": said.get(each.key) or None, "model": model} for each, _ in batch]
            unfinished = out / f"{file.stem}.part"
            pq.write_table(pa.Table.from_pylist(rows, COLUMNS), unfinished)
            os.replace(unfinished, out / f"{file.stem}.parquet")
            yield file


def _summary(files: Sequence[Path]) -> dict[str, Any]:
    """Return the number of samples and of captions, and the mean of the captions' words. One shard is in memory at a time."""
    samples = captioned = words = 0
    for file in files:
        captions = pq.read_table(file, columns=["caption"])["caption"]
        samples += len(captions)
        captioned += len(captions) - captions.null_count
        words += pc.sum(pc.list_value_length(pc.utf8_split_whitespace(captions))).as_py() or 0
    return {"samples": samples, "captioned": captioned, "words": round(words / max(captioned, 1), 3)}
