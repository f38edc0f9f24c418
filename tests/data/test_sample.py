"""`koala data sample` on a real list and the demo's server, faults included."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from koala.data.config import DownloadConfig
from koala.data.sample import sample
from koala.data.tables import TableSource
from koala.demo.server import ShapesServer
from koala.demo.table import ShapesSource
from koala.errors import KoalaError


def listed(*urls: str) -> TableSource:
    rows = "".join(f"{url},caption {number},{number}.5,by\n" for number, url in enumerate(urls))
    Path("t.csv").write_text(f"url,caption,score,licence\n{rows}")
    return TableSource(kind="file", location="t.csv", private_hosts=True, score_columns=("score",), carry=("licence",))


def download(server: ShapesServer, **changes: Any) -> DownloadConfig:
    machine = {"timeout": 20, "retries": 0}
    return DownloadConfig(image_size=64, allow=(f"127.0.0.1:{server.server_port}",), machine=machine, **changes)


def test_rows_and_their_pictures(out: Path, server: ShapesServer, capsys: pytest.CaptureFixture[str]) -> None:
    urls = [f"{server.url}/{kind}/00001.jpg" for kind in ("ok", "missing", "html")]
    config = listed(urls[0], "ftp://a.com/x", urls[1], "http://127.0.0.1:9/x.jpg", urls[2], "http://no.more.example/")
    sample(config, download(server), 4, Path("deep/sheet.png"))
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines() if "caption" in line]
    assert lines[0] == ["url", "caption", "score", "licence", "picture"]
    assert [line[0] for line in lines[1:]] == [urls[0], urls[1], "http://127.0.0.1:9/x.jpg", urls[2]]
    assert lines[1][3:5] == ["0.5", "by"]
    for text in ("status 404", "address refused", "a page, no image", "not_http", "deep/sheet.png"):
        assert text in said
    sheet = Image.open("deep/sheet.png").convert("RGB")
    assert len(set(sheet.crop((6, 6, 166, 166)).get_flattened_data())) > 2, "the first picture is not there"


def test_no_pictures_asks_nobody(out: Path, server: ShapesServer, capsys: pytest.CaptureFixture[str]) -> None:
    config = listed("https://example.com/a\x1b[2J.jpg")
    sample(config, download(server, sidecar=("false",)), 4, None)
    said = capsys.readouterr().out
    assert "picture" not in said
    assert "\x1b" not in said
    with pytest.raises(KoalaError, match=r"^t.csv holds no usable row"):
        sample(listed("x"), download(server), 4, None)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_is_copied_stands_in_one_line(
    out: Path,
    server: ShapesServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_terminal: bool,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    url = f"https://example.com/{'deep/' * 60}1.jpg"
    sample(listed(url, "https://example.com/2.jpg"), download(server), 2, None)
    said = capsys.readouterr().out
    assert url in said
    assert (f"\nurl      {url}\n" in said) == is_terminal
    assert ("\nlicence  by\n" in said) == is_terminal
    sample(listed("https://example.com/2.jpg"), download(server), 1, None)
    assert "url                         caption" in capsys.readouterr().out


def test_a_sample_of_the_demo_shows_its_first_rows(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ShapesSource(location="http://127.0.0.1:8765", rows=120, seed=1)
    first = next(config.tables({})).to_pylist()[0]  # type: ignore[arg-type]
    sample(config, DownloadConfig(image_size=32), 3, None)
    said = capsys.readouterr().out
    assert first["caption"] in said
    assert "3 rows of" in said
