"""Images for `koala bench data`: drawn, all different, in shards and from a server on loopback."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from koala.console import progress

SHARD = 5_000
"""Images of a shard."""
SIDE = 64
"""Side of an image, px."""


def _image(number: int) -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _caption(number: int) -> str:
    return f"a photograph of thing {number}, on a wooden table, in the light of the morning"


def write_images(folder: Path, count: int) -> None:
    """Write `count` images with captions, as the download leaves them."""
    from koala.data.shards import Sample, ShardWriter

    with ShardWriter(folder, SHARD) as writer:
        for number in progress(range(count), "bench data: images"):
            meta = {"url": f"https://example.com/{number}.jpg", "original_width": SIDE, "original_height": SIDE}
            writer.write(Sample(f"{number:09d}", _image(number), "jpg", _caption(number), meta))


def write_table(folder: Path, count: int, port: int) -> None:
    """Write the table of as many images that `served` serves."""
    import pyarrow as pa

    from koala.data.source import write_parts

    folder.mkdir()
    urls = [f"http://127.0.0.1:{port}/{number}.jpg" for number in range(count)]
    write_parts([pa.table({"url": urls, "caption": map(_caption, range(count))})], folder)


_few = cache(_image)


class _Handler(BaseHTTPRequestHandler):
    """Answers /N.jpg with one of some images."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer."""
        image = _few(int(Path(self.path).stem) % 64)
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(image)))
        self.end_headers()
        self.wfile.write(image)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def served() -> Iterator[int]:
    """Serve images on loopback inside the block; give the port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
