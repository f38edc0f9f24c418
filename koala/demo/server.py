"""A loopback HTTP server of the project's own images, with the faults of the real web.

    koala serve-shapes --port 8765 --seed 1
    http://127.0.0.1:8765/ok/00012.jpg          # scene 12 of series 1, drawn on request

The first part of a path names the fault (see `FAULTS`; `ok` and `copy` have none), the number the scene.
"""

import contextlib
import errno
import io
import re
import select
import signal
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType
from typing import Any

import numpy as np

from koala.console import show
from koala.demo import shapes
from koala.errors import KoalaError

HOST = "127.0.0.1"
SMALLEST, LARGEST = 48, 96
"""Sides of good images in pixels."""
TINY = 8
"""Side of useless images in pixels."""
SLOW_SECONDS = 60.0
"""A delay longer than any client's timeout."""

_PATH = re.compile(r"/(?P<kind>[a-z]+)/(?P<index>\d{1,9})\.jpg")
_PAGE = b"<!doctype html><title>Moved</title><p>This picture is no longer here.</p>"


def jpeg(seed: int, index: int, side: int | None = None) -> bytes:
    """Return a scene as a JPEG without chroma subsampling. `side` is in pixels; the default is a function of the index."""
    side = side or int(np.random.default_rng((seed, index, 2)).integers(SMALLEST, LARGEST + 1))
    buffer = io.BytesIO()
    shapes.draw(shapes.sample_scene(seed, index), side).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


class ShapesServer(ThreadingHTTPServer):
    """Server of the series `seed` on loopback."""

    daemon_threads = True
    # A downloader opens many connections at once; with the default of 5, some would wait a second.
    request_queue_size = 256

    def __init__(self, port: int, seed: int) -> None:
        """Listen on `port`, or on a free one if it is 0: see `url`."""
        self.seed = seed
        self._seen: set[str] = set()
        self._lock = threading.Lock()
        super().__init__((HOST, port), _Handler)

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://{HOST}:{self.server_port}"

    def first_time(self, path: str) -> bool:
        """Return whether this is the first request for `path`."""
        with self._lock:
            first = path not in self._seen
            self._seen.add(path)
        return first

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report the current exception, unless a client hung up: they often do."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: ShapesServer

    def do_GET(self) -> None:
        """Answer by the path's fault; 404 for any other path."""
        match = _PATH.fullmatch(self.path)
        answer = _ANSWERS.get(match["kind"]) if match else None
        if match and answer:
            answer(self, int(match["index"]))
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        """Do nothing: the log would have thousands of lines."""

    def good(self, index: int) -> None:
        """Send the image."""
        self._send(jpeg(self.server.seed, index))

    def tiny(self, index: int) -> None:
        """Send a thumbnail."""
        self._send(jpeg(self.server.seed, index, TINY))

    def missing(self, index: int) -> None:
        """Answer 404."""
        self.send_error(404)

    def error(self, index: int) -> None:
        """Answer 500."""
        self.send_error(500)

    def flaky(self, index: int) -> None:
        """Answer 500 the first time, then send the image."""
        if self.server.first_time(self.path):
            self.send_error(500)
        else:
            self.good(index)

    def slow(self, index: int) -> None:
        """Send nothing until the client's timeout."""
        select.select([self.connection], [], [], SLOW_SECONDS)

    def html(self, index: int) -> None:
        """Send a page under an image's name."""
        self._send(_PAGE, "text/html")

    def truncated(self, index: int) -> None:
        """Send half of the promised bytes."""
        image = jpeg(self.server.seed, index)
        self._send(image[: len(image) // 2], length=len(image))

    def _send(self, body: bytes, kind: str = "image/jpeg", length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


FAULTS: dict[str, Callable[[_Handler, int], None]] = {
    "missing": _Handler.missing,
    "error": _Handler.error,
    "flaky": _Handler.flaky,
    "slow": _Handler.slow,
    "html": _Handler.html,
    "truncated": _Handler.truncated,
    "tiny": _Handler.tiny,
}
_ANSWERS = FAULTS | {"ok": _Handler.good, "copy": _Handler.good}


def serve(port: int, seed: int) -> None:
    """Serve until SIGTERM or SIGINT, after one line on stdout. Raises KoalaError if the port is taken."""
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell's background job starts with SIGINT ignored
        signal.signal(number, _interrupt)
    try:
        server = ShapesServer(port, seed)
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise KoalaError(f"port {port} is in use: stop what listens there, or choose another --port") from None
        raise KoalaError(f"cannot listen on port {port}: choose another --port ({error})") from None
    with server:
        show(f"images of series {seed} on {server.url}")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
