import http.client
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from PIL import Image

from koala.demo import shapes
from koala.demo.server import LARGEST, SMALLEST, TINY, ShapesServer, jpeg, serve
from koala.errors import KoalaError


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ShapesServer(port=0, seed=1) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server.url
        server.shutdown()
        thread.join()


def get(url: str, timeout: float = 5) -> bytes:
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        return answer.read()


def status(url: str) -> int:
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(url)
    caught.value.close()
    return caught.value.code


@pytest.mark.parametrize("index", [0, 7, 4399])
def test_a_picture_shows_the_scene_of_its_index(url: str, index: int) -> None:
    image = Image.open(io.BytesIO(get(f"{url}/ok/{index:05d}.jpg")))
    assert image.format == "JPEG"
    assert image.width == image.height
    assert SMALLEST <= image.width <= LARGEST
    assert shapes.read(image) == shapes.sample_scene(1, index).attributes


def test_sides_vary_and_bytes_do_not(url: str) -> None:
    assert len({Image.open(io.BytesIO(jpeg(1, index))).width for index in range(20)}) > 5
    assert get(f"{url}/ok/00003.jpg") == get(f"{url}/copy/00003.jpg") == jpeg(1, 3)
    assert jpeg(2, 3) != jpeg(1, 3)


def test_missing_and_broken(url: str) -> None:
    assert status(f"{url}/missing/00001.jpg") == 404
    assert [status(f"{url}/error/00001.jpg") for _ in range(2)] == [500, 500]


@pytest.mark.parametrize("path", ["/", "/ok/", "/ok/x.jpg", "/ok/../../etc/passwd", "/wrong/00001.jpg", "/good/1.jpg"])
def test_other_paths_are_not_there(url: str, path: str) -> None:
    assert status(url + path) == 404


def test_flaky_is_good_the_second_time(url: str) -> None:
    assert status(f"{url}/flaky/00005.jpg") == 500
    assert get(f"{url}/flaky/00005.jpg") == jpeg(1, 5)


def test_slow_outlasts_the_client_and_lets_others_through(url: str) -> None:
    with socket.create_connection(tuple(url.removeprefix("http://").split(":")), timeout=5) as waiting:
        waiting.sendall(b"GET /slow/00001.jpg HTTP/1.0\r\n\r\n")
        assert get(f"{url}/ok/00001.jpg")
        waiting.settimeout(0.2)
        with pytest.raises(TimeoutError):
            waiting.recv(1)


def test_a_page_under_a_pictures_name(url: str) -> None:
    assert b"<title>" in get(f"{url}/html/00001.jpg")


def test_a_body_cut_short(url: str) -> None:
    with pytest.raises(http.client.IncompleteRead) as caught:
        get(f"{url}/truncated/00001.jpg")
    assert jpeg(1, 1).startswith(caught.value.partial)


def test_a_thumbnail(url: str) -> None:
    assert Image.open(io.BytesIO(get(f"{url}/tiny/00001.jpg"))).size == (TINY, TINY)


def test_a_taken_port_is_one_line(url: str) -> None:
    port = int(url.rsplit(":", 1)[1])
    with pytest.raises(KoalaError, match=f"^port {port} is in use: "):
        serve(port, seed=1)
    with pytest.raises(KoalaError, match="cannot listen on port 70000"):
        serve(70000, seed=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_when_it_is_ready_and_leaves_when_told(number: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from koala.demo.server import serve; serve(port={port}, seed=1)"
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert str(port) in process.stdout.readline()
    assert time.monotonic() - start < 5, "it imports something heavy"
    assert get(f"http://127.0.0.1:{port}/ok/00001.jpg") == jpeg(1, 1)
    os.kill(process.pid, number)
    assert process.communicate(timeout=5) == ("", "")
    assert process.returncode == 0
