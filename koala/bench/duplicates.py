"""`koala bench duplicates`: time, recall and memory of the search for near duplicates, each in a separate process.

Hashes are as skewed as those of pictures on a white ground.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from koala.bench import runner
from koala.bench.data_worker import peak
from koala.console import progress, show, text_table
from koala.data.dedup import Groups, matrix, near_pairs
from koala.data.fingerprints import SIDE, TABLES, pattern, plane_hashes

if TYPE_CHECKING:
    import pyarrow as pa

PICTURES = (10_000, 100_000)
_CHUNK = 10_000


def bench(pictures: Sequence[int], memory_gb: float) -> None:
    """Measure the search among each number of `pictures`, and show how it grows."""
    rows = []
    for count in progress(pictures or PICTURES, "bench duplicates"):
        found = runner.run("duplicates", {"pictures": count, "memory_gb": memory_gb})
        if "seconds" not in found:
            rows.append([f"{count:,}", "failed", "-", "-"])
            continue
        figures = (f"{found['pictures_per_second']:,.0f}", f"{found['recall']:.3f}", f"{found['peak_gb']:.2f}")
        rows.append([f"{count:,}", *figures])
    show(text_table(["pictures", "pictures a CPU second", "recall", "peak memory, GB"], rows))


def measure(pictures: int = 1_000_000, memory_gb: float = 1.0) -> dict[str, float]:
    """Return seconds of CPU, pictures a second, recall and peak memory (GB) among `pictures`, of which a hundredth are copies.

    Half of the pictures are white but for a part, and share a dHash of which 12 bits vary.
    """
    import duckdb
    import pyarrow as pa

    rng = np.random.default_rng(0)
    copies = pictures // 100
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": f"{memory_gb}GB",
            "threads": 1,
            "temp_directory": folder,
        }
        with duckdb.connect(str(Path(folder, "db")), config=settings) as connection:
            connection.execute("SET enable_progress_bar = false")
            for start in range(0, pictures, _CHUNK):
                count = min(_CHUNK, pictures - start)
                pixels = rng.integers(0, 256, (count, 3 * SIDE**2), dtype=np.uint8)
                hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
                white = rng.random(count) < 0.5
                pixels[white, : 2 * SIDE**2] = 255
                hashes[white] &= np.uint64(0x0000183C3C180000)
                # The last hundredth of each chunk are copies of its first.
                part = count // 100
                noisy = pixels[:part] + rng.integers(-6, 7, (part, 3 * SIDE**2))
                pixels[count - part :], hashes[count - part :] = np.clip(noisy, 0, 255), hashes[:part]
                columns = dict(
                    zip((f"look_{table}" for table in range(TABLES)), plane_hashes(pattern(pixels)).T, strict=True)
                )
                rows = pa.table(
                    {
                        "position": np.arange(start, start + count),
                        "dhash": hashes,
                        "thumbnail": pa.array([row.tobytes() for row in pixels]),
                        **columns,
                    }
                )
                connection.register("rows", rows)
                connection.execute(
                    f"{'INSERT INTO picture' if start else 'CREATE TABLE picture AS'} SELECT * FROM rows"
                )
            groups, begun = Groups(), time.process_time()
            for table in range(TABLES):
                query = f"SELECT position, look_{table} AS key, dhash, thumbnail FROM picture"
                for left, right in near_pairs(connection, query, _patterns, 0.992, bits=16):
                    groups.add(left, right)
            members, _ = groups.members()
            seconds = time.process_time() - begun
    return {
        "seconds": seconds,
        "pictures_per_second": pictures / seconds,
        "recall": len(members) / (2 * copies),
        "peak_gb": peak() / 1e9,
    }


def _patterns(rows: "pa.Table") -> np.ndarray:
    return pattern(matrix(rows["thumbnail"], np.uint8))


if __name__ == "__main__":
    show(json.dumps(measure(**json.loads(sys.argv[1]))))
