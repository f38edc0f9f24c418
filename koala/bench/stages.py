"""`koala bench stages`: how the stages after the list grow with its length, each pass in a separate process.

Images are drawn, 64 px, all different. The download fetches them from a server on loopback; encode has a VAE that costs nothing.
"""

import io
import os
import platform
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from koala.bench import report, runner
from koala.bench.device import processor
from koala.console import progress
from koala.data.shards import Sample, ShardWriter
from koala.errors import KoalaError

PASSES = ("download", "judge", "decide", "write", "encode")
"""In the order in which each finds what those before it made; the download makes nothing that they read."""
ROWS = (10_000, 100_000)
SHARD = 5_000


def bench(rows: Sequence[int], passes: Sequence[str], out: Path | None) -> None:
    """Measure the passes over each number of rows and show rows a CPU second and memory; the raw figures go to `out`.

    Raises KoalaError for a pass that is none.
    """
    if unknown := [name for name in passes if name not in PASSES]:
        raise KoalaError(f"no pass {unknown[0]!r} to measure: choose from {', '.join(PASSES)}")
    wanted = [name for name in PASSES if name in (passes or PASSES)]
    where = {"device": f"{processor()}, {os.cpu_count()} threads", "python": platform.python_version()}
    found = []
    for count in rows or ROWS:
        with tempfile.TemporaryDirectory(prefix="koala-bench-") as folder, _served() as port:
            if set(wanted) - {"download"}:
                _write_images(Path(folder, "images"), count)
            _write_table(Path(folder, "table"), count, port)
            for name in progress(wanted, f"bench stages: {count:,} rows"):
                figures = runner.run("stages_worker", {"name": name, "folder": folder, "port": port})
                found.append({"name": name, "rows": count, **figures, "seconds_of_rounds": [], "where": where})
    report.data(report.document("stages", {"shard": SHARD}, found), out, None)


def _image(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _caption(number: int) -> str:
    return f"a photograph of thing {number}, on a wooden table, in the light of the morning"


def _write_images(folder: Path, count: int) -> None:
    with ShardWriter(folder, SHARD) as writer:
        for number in progress(range(count), "bench stages: images"):
            meta = {"url": f"https://example.com/{number}.jpg", "original_width": 64, "original_height": 64}
            writer.write(Sample(f"{number:09d}", _image(number), "jpg", _caption(number), meta))


def _write_table(folder: Path, count: int, port: int) -> None:
    folder.mkdir()
    urls = [f"http://127.0.0.1:{port}/{number}.jpg" for number in range(count)]
    pq.write_table(pa.table({"url": urls, "caption": map(_caption, range(count))}), folder / "part-00000.parquet")


class _Handler(BaseHTTPRequestHandler):
    """Answers /N.jpg with one of some images."""

    protocol_version = "HTTP/1.1"
    images = tuple(map(_image, range(64)))

    def do_GET(self) -> None:
        """Answer."""
        image = self.images[int(Path(self.path).stem) % len(self.images)]
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(image)))
        self.end_headers()
        self.wfile.write(image)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def _served() -> Iterator[int]:
    """Serve images on loopback inside the block; give the port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
