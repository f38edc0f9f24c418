"""img2dataset against a real server with real faults, with real processes that are really killed."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from koala.data import download
from koala.data.config import DownloadConfig
from koala.data.shards import read_shards, shards
from koala.demo.server import TINY, ShapesServer, picture
from koala.errors import KoalaError
from koala.provenance import data_hash

ROWS = 12  # a shard


def config(**changes: Any) -> DownloadConfig:
    values = {"image_size": 32, "encode_format": "png", "encode_quality": 1, "shard_size": ROWS, "threads": 8}
    return DownloadConfig(**(values | {"timeout": 1, "retries": 1} | changes))


def write_table(stages: Any, urls: list[str]) -> Path:
    folder = stages.out("source")
    folder.mkdir(parents=True, exist_ok=True)
    captions = [f"caption {number} é" for number in range(len(urls))]
    scores = [number / 4 for number in range(len(urls))]
    table = folder / "table.parquet"
    pq.write_table(pa.table({"url": urls, "caption": captions, "aesthetic": scores}), table)
    return table


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def sidecar(port: int) -> tuple[str, ...]:
    return (sys.executable, "-c", f"from koala.demo.server import serve; serve({port}, 1)")


def mine(marks: str) -> list[psutil.Process]:
    """Processes that have `marks` (this test's folder) as their working directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == marks and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def start(stages: Any) -> subprocess.Popen:
    """The stage in a process of its own, as the command line runs it."""
    code = f"""
from pathlib import Path
from types import SimpleNamespace
from koala.data import download
from koala.data.config import DownloadConfig
params = SimpleNamespace(download=DownloadConfig(**{stages.download.model_dump()!r}))
params.out = params.need = lambda stage: Path("artifacts", "test", stage)
run = SimpleNamespace(tags=print, metrics=print, figure=print, artifact=print)
download.run(params, run)
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


PATHS = ("ok", "missing", "error", "flaky", "html", "truncated", "tiny", "copy", "ok", "slow")
OUTCOMES = {
    "ok": None,
    "copy": None,
    "flaky": None,
    "tiny": None,
    "missing": "HTTP Error 404: Not Found",
    "error": "HTTP Error 500: Internal Server Error",
    "html": "Image decoding error",
    "truncated": "IncompleteRead",
    "slow": "timed out",
}


def test_a_killed_download_goes_on_and_every_fault_has_its_outcome(stages: Any, recorder: Any) -> None:
    port = free_port()
    urls = [f"http://127.0.0.1:{port}/ok/{index:05d}.jpg" for index in range(ROWS)]
    urls += [f"http://127.0.0.1:{port}/{kind}/{index:05d}.jpg" for index, kind in enumerate(PATHS, start=ROWS)]
    write_table(stages, urls)
    stages.download = config(sidecar=sidecar(port))

    # Killed while its second shard waits for the slow picture: nothing is left running, the first shard stands.
    first = start(stages)
    wait(lambda: list(Path("runs").glob("download/*/shards/00000_stats.json")))
    assert len(mine(os.getcwd())) >= 4
    first.kill()
    first.wait()
    wait(lambda: not mine(os.getcwd()), 10)
    (work,) = Path("runs/download").iterdir()
    finished = (work / "shards" / "00000.tar").stat()
    assert not (work / "shards" / "00001_stats.json").exists(), "the test killed it too late"

    download.run(stages, recorder)
    out = stages.out("download")
    assert (out / "00000.tar").stat().st_mtime_ns == finished.st_mtime_ns, "a finished shard was fetched again"
    assert not mine(os.getcwd()) and not list(Path("runs/download").iterdir())

    rows = {
        row["url"]: row for shard in ("00000", "00001") for row in pq.read_table(out / f"{shard}.parquet").to_pylist()
    }
    for url in urls:
        error = rows[url]["error_message"]
        wanted = OUTCOMES[url.split("/")[3]]
        assert (error is None and wanted is None) or (wanted and error.startswith(wanted)), (url, error)
    stats = json.loads((out / "stats.json").read_text())
    assert stats["status"] == {"success": ROWS + 5, "failed_to_download": 4, "failed_to_resize": 1}
    assert stats["rows"] == len(urls) and stats["success_share"] == round((ROWS + 5) / len(urls), 6)
    assert stats["errors"]["IncompleteRead(N bytes read, N more expected)"] == 1
    assert recorder.logged["success"] == ROWS + 5
    assert recorder.tagged == {"data_hash.source": data_hash(stages.need("source"))}
    assert Image.open(out / "outcomes.png").width > 300

    samples = list(read_shards(out))
    assert [sample.meta["url"] for sample in samples] == [url for url in urls if OUTCOMES[url.split("/")[3]] is None]
    for sample in samples:
        row = urls.index(sample.meta["url"])
        assert sample.caption == f"caption {row} é" and sample.meta["aesthetic"] == row / 4
        side = sample.meta["original_width"]
        assert sample.meta["original_height"] == side
        assert sample.meta["width"] == min(side, 32), "small pictures are not blown up"
        if side != TINY:
            assert sample.meta["sha256"] == hashlib.sha256(picture(1, row)).hexdigest()


def test_sigterm_leaves_nothing_behind(stages: Any) -> None:
    port = free_port()
    write_table(stages, [f"http://127.0.0.1:{port}/ok/00001.jpg"])
    stages.download = config(sidecar=sidecar(port))
    stage = start(stages)
    wait(lambda: len(mine(os.getcwd())) >= 5)  # the stage, two guards, the server, img2dataset
    family = mine(os.getcwd())
    assert {os.getpgid(process.pid) for process in family} == {os.getpgid(0)}, "cancellation signals the group"
    stage.send_signal(signal.SIGTERM)
    assert stage.wait(5) == -signal.SIGTERM
    wait(lambda: not mine(os.getcwd()), 10)
    assert not stages.out("download").exists()


def test_nothing_downloaded_is_one_line_and_is_tried_again(
    stages: Any, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(stages, ["http://127.0.0.1:9/ok/00001.jpg"] * 4)
    stages.download = config()
    monkeypatch.setattr(download, "fetch", lambda table, config, shards, logs: shard(shards, 0, rows=4, successes=0))
    with pytest.raises(KoalaError, match=r"^none of 4 images could be downloaded; mostly: took N s$"):
        download.run(stages, recorder)
    assert not stages.out("download").exists()
    assert not list(Path("runs/download").iterdir())


# The sidecar.


def test_a_sidecar_that_dies_says_why(stages: Any, recorder: Any) -> None:
    write_table(stages, [f"http://127.0.0.1:{free_port()}/ok/00001.jpg"])
    stages.download = config(sidecar=(sys.executable, "-c", "import sys; sys.exit('koala: the tunnel is closed')"))
    with pytest.raises(KoalaError, match=r"sidecar ended: the tunnel is closed$"):
        download.run(stages, recorder)
    assert not mine(os.getcwd())


def test_a_sidecar_whose_port_is_taken_stops_the_download(stages: Any, recorder: Any, server: ShapesServer) -> None:
    """What listens there may be anything: its pictures are not the table's."""
    write_table(stages, [f"{server.url}/ok/00001.jpg"])
    stages.download = config(sidecar=sidecar(server.server_port))
    with pytest.raises(KoalaError, match=f"download.sidecar ended: .*port {server.server_port} is in use"):
        download.run(stages, recorder)
    assert not mine(os.getcwd()) and not stages.out("download").exists()


def test_a_sidecar_that_does_not_serve_is_given_up(stages: Any, recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    write_table(stages, [f"http://127.0.0.1:{port}/ok/00001.jpg"])
    monkeypatch.setattr(download, "SIDECAR_SECONDS", 0.5)
    stages.download = config(sidecar=("sleep", "60"))
    with pytest.raises(KoalaError, match=f"download.sidecar runs, but 127.0.0.1:{port} accepts no connection"):
        download.run(stages, recorder)
    assert not mine(os.getcwd())


# What img2dataset left.


def shard(folder: Path, number: int, rows: int = 4, successes: int = 2, counted: int | None = None) -> None:
    stats = {
        "count": counted or rows,
        "successes": successes,
        "failed_to_download": rows - successes,
        "failed_to_resize": 0,
    }
    stats |= {"status_dict": {"success": successes, f"took {number} s": rows - successes}}
    (folder / f"{number:05d}_stats.json").write_text(json.dumps(stats))
    pq.write_table(pa.table({"url": ["u"] * rows}), folder / f"{number:05d}.parquet")
    (folder / f"{number:05d}.tar").touch()


def test_shards_that_are_not_whole_are_done_again(tmp_path: Path) -> None:
    shard(tmp_path, 0)
    shard(tmp_path, 1, successes=0)  # the network was down
    shard(tmp_path, 2, counted=5)  # a row was lost on its way to the disk
    (tmp_path / "00003_stats.json").write_text('{"count": 4, ')  # killed while it was written
    download._discard_unfinished(tmp_path)
    assert [file.name for file in tmp_path.glob("*_stats.json")] == ["00000_stats.json"]
    assert len(shards(tmp_path)) == 3


def test_statistics_add_up_and_group_messages(tmp_path: Path) -> None:
    shard(tmp_path, 1)
    shard(tmp_path, 22, successes=3)
    assert download.summarise(tmp_path) == {
        "rows": 8,
        "success_share": 0.625,
        "status": {"success": 5, "failed_to_download": 3, "failed_to_resize": 0},
        "errors": {"took N s": 3},
    }


def test_messages_of_servers_command_no_terminal_and_no_plot(tmp_path: Path) -> None:
    message = "HTTP Error 404: \x1b[2J$\\frac{1$"
    assert download._kind_of_error(message) == "HTTP Error 404: [2J$\\frac{N$"
    stats = {"rows": 1, "status": {"success": 0}, "errors": {download._kind_of_error(message): 1}}
    download.plot(stats).savefig(tmp_path / "plot.png")


def test_a_worker_that_was_lost_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10**6, 100))
    monkeypatch.setattr(download.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    with subprocess.Popen(["sleep", "60"]) as hangs:
        with pytest.raises(KoalaError, match="img2dataset has stood still for 400 s"):
            list(download._watch(hangs, None, tmp_path, 0, config(), tmp_path))
        hangs.kill()


def test_no_proxy_stands_between_us_and_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "example.com")
    assert download._environment()["no_proxy"] == "example.com,127.0.0.1,localhost"
    assert download._environment()["WANDB_MODE"] == "disabled"


def test_png_takes_a_compression() -> None:
    with pytest.raises(ValidationError, match="encode_quality of png"):
        config(encode_quality=95)
