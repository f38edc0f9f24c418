"""`koala bench duplicates`: time, recall and memory of the search for near duplicates, each in a separate process.

Half of the pictures are as alike as those on a white ground.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from koala.bench import runner
from koala.bench.data_worker import peak
from koala.console import progress, show, text_table
from koala.data.alike import confirm, propose
from koala.data.config import NearDuplicates
from koala.data.fingerprints import LOOK_HASHES, pattern, plane_hashes, thumbnail
from koala.data.registration import miniature

if TYPE_CHECKING:
    import pyarrow as pa

PICTURES = (10_000, 100_000)
_CHUNK = 2_000
_SIDE = 128


def bench(pictures: Sequence[int], memory_gb: float) -> None:
    """Measure the search among each number of `pictures`, and show how it grows."""
    rows = []
    for count in progress(pictures or PICTURES, "bench duplicates"):
        found = runner.run("duplicates", {"pictures": count, "memory_gb": memory_gb})
        if "seconds" not in found:
            rows.append([f"{count:,}", "failed", *"-" * 4])
            continue
        figures = (
            f"{found['pictures_per_second']:,.0f}",
            f"{found['pairs'] / count:.2f}",
            *(f"{found[name]:.3f}" for name in ("recall", "recall_cropped")),
            f"{found['peak_gb']:.2f}",
        )
        rows.append([f"{count:,}", *figures])
    headings = [
        "pictures",
        "pictures a CPU second",
        "pairs a picture",
        "recall",
        "recall, 5 % cut off",
        "peak memory, GB",
    ]
    show(text_table(headings, rows))


def measure(pictures: int = 1_000_000, memory_gb: float = 1.0) -> dict[str, float]:
    """Return seconds of CPU, pictures a second, recalls and peak memory (GB) among `pictures`.

    Half of the pictures are white but for a part. A hundredth are re-encoded copies, a hundredth copies of which 5 % of the width
    are cut off.
    """
    import duckdb

    rng = np.random.default_rng(0)
    part = min(_CHUNK, pictures) // 100
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": f"{memory_gb}GB",
            "threads": 1,
            "temp_directory": folder,
        }
        with duckdb.connect(str(Path(folder, "db")), config=settings) as connection:
            connection.execute("SET enable_progress_bar = false")
            for start in range(0, pictures, _CHUNK):
                rows = _rows(start, min(_CHUNK, pictures - start), part, rng)
                pq.write_table(rows, Path(folder, f"{start:012d}.parquet"))
            connection.read_parquet(f"{folder}/*.parquet").create_view("judged")
            connection.execute("CREATE TABLE candidate AS SELECT position, sha256 FROM judged")
            begun = time.process_time()
            propose(connection, NearDuplicates(cosine=None))
            confirm(connection, NearDuplicates().registered)
            seconds = time.process_time() - begun
            same = connection.execute(f"SELECT position % {_CHUNK} FROM same WHERE position < other").fetchnumpy()
            pairs = connection.execute("SELECT count(*) FROM pair").fetchall()[0][0]
    (of,) = same.values()
    chunks = -(-pictures // _CHUNK)
    return {
        "seconds": seconds,
        "pictures_per_second": pictures / seconds,
        "pairs": pairs,
        "recall": int((of < part).sum()) / (part * chunks),
        "recall_cropped": int(((of >= part) & (of < 2 * part)).sum()) / (part * chunks),
        "peak_gb": peak() / 1e9,
    }


def _rows(start: int, count: int, part: int, rng: np.random.Generator) -> "pa.Table":
    """Return rows of a judged table; of the first `part` pictures the last are copies, of the next ones those before are crops."""
    import pyarrow as pa

    coarse = rng.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    coarse[rng.random(count) < 0.5, :3] = 255
    large = [Image.fromarray(each).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC) for each in coarse]
    for index in range(part):
        noise = rng.integers(-6, 7, (_SIDE, _SIDE, 3))
        copied, cropped = large[index], large[part + index]
        large[count - part + index] = Image.fromarray(np.clip(np.asarray(copied) + noise, 0, 255).astype(np.uint8))
        large[count - 2 * part + index] = cropped.crop((_SIDE // 20, 0, _SIDE, _SIDE))
    thumbnails = [thumbnail(image) for image in large]
    hashes = plane_hashes(pattern(np.stack([np.frombuffer(each, np.uint8) for each in thumbnails])))
    return pa.table(
        {
            "position": np.arange(start, start + count),
            "sha256": [f"{position:032d}".encode() for position in range(start, start + count)],
            "dhash": np.zeros(count, np.uint64),
            "thumbnail": pa.array(thumbnails),
            "miniature": pa.array([miniature(image) for image in large]),
            **dict(zip(LOOK_HASHES, hashes.T, strict=True)),
        }
    )


if __name__ == "__main__":
    show(json.dumps(measure(**json.loads(sys.argv[1]))))
