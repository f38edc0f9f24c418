"""A loopback HTTP server of the project's own pictures, with the faults of the real web.

    koala serve-shapes --port 8765 --seed 1
    http://127.0.0.1:8765/ok/00012.jpg          # the scene number 12 of the series 1, drawn when it is asked for

The first part of a path says what goes wrong (`FAULTS`, or `ok` and `copy` where nothing does), the number which scene.
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

from koala.demo import shapes
from koala.errors import KoalaError

HOST = "127.0.0.1"
SMALLEST, LARGEST = 48, 96  # sides of good pictures, in pixels
TINY = 8  # the side of pictures that are too small to be of use
SLOW_SECONDS = 60.0  # longer than any client waits

_PATH = re.compile(r"/(?P<kind>[a-z]+)/(?P<index>\d{1,9})\.jpg")
_PAGE = b"<!doctype html><title>Moved</title><p>This picture is no longer here.</p>"


def picture(seed: int, index: int, side: int | None = None) -> bytes:
    """The JPEG of a scene, its colours not subsampled; the side follows from the index unless `side` (pixels) says."""
    side = side or int(np.random.default_rng((seed, index, 2)).integers(SMALLEST, LARGEST + 1))
    buffer = io.BytesIO()
    shapes.draw(shapes.sample_scene(seed, index), side).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


class ShapesServer(ThreadingHTTPServer):
    """Serves the series `seed` on loopback. Port 0 takes a free one; `url` says which."""

    daemon_threads = True
    request_queue_size = (
        256  # a downloader opens many connections at once; the default of 5 would make some wait a second
    )

    def __init__(self, port: int, seed: int) -> None:
        self.seed = seed
        self._seen: set[str] = set()
        self._lock = threading.Lock()
        super().__init__((HOST, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}"

    def first_time(self, path: str) -> bool:
        """Whether this is the first request for `path`."""
        with self._lock:
            first = path not in self._seen
            self._seen.add(path)
        return first

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the game; anything else is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: ShapesServer

    def do_GET(self) -> None:
        match = _PATH.fullmatch(self.path)
        answer = _ANSWERS.get(match["kind"]) if match else None
        if match and answer:
            answer(self, int(match["index"]))
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: thousands of requests are no news."""

    def good(self, index: int) -> None:
        self._send(picture(self.server.seed, index))

    def tiny(self, index: int) -> None:
        self._send(picture(self.server.seed, index, TINY))

    def missing(self, index: int) -> None:
        self.send_error(404)

    def error(self, index: int) -> None:
        self.send_error(500)

    def flaky(self, index: int) -> None:
        if self.server.first_time(self.path):
            self.send_error(500)
        else:
            self.good(index)

    def slow(self, index: int) -> None:
        # Wait until the client hangs up: its time-out is what this is about.
        select.select([self.connection], [], [], SLOW_SECONDS)

    def html(self, index: int) -> None:
        self._send(_PAGE, "text/html")

    def truncated(self, index: int) -> None:
        whole = picture(self.server.seed, index)
        self._send(whole[: len(whole) // 2], length=len(whole))

    def _send(self, body: bytes, kind: str = "image/jpeg", length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


FAULTS: dict[str, Callable[[_Handler, int], None]] = {
    "missing": _Handler.missing,  # 404
    "error": _Handler.error,  # 500
    "flaky": _Handler.flaky,  # 500 the first time, then good
    "slow": _Handler.slow,  # no answer before the client's time-out
    "html": _Handler.html,  # a page under a picture's name
    "truncated": _Handler.truncated,  # half of the bytes that were promised
    "tiny": _Handler.tiny,  # a thumbnail
}
_ANSWERS = FAULTS | {"ok": _Handler.good, "copy": _Handler.good}


def serve(port: int, seed: int) -> None:
    """Serve until SIGTERM or SIGINT; one line on stdout says when. Raises KoalaError where the port is taken."""
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell's background job starts with SIGINT ignored
        signal.signal(number, _interrupt)
    try:
        server = ShapesServer(port, seed)
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise KoalaError(f"port {port} is in use: stop what listens there, or choose another --port") from None
        raise KoalaError(f"cannot listen on port {port}: choose another --port ({error})") from None
    with server:
        print(f"pictures of series {seed} on {server.url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
