"""img2dataset against a real server with real faults, with real processes that are really killed."""

import hashlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.processes import mine, wait_until
from PIL import Image
from pydantic import ValidationError
from space import short_of_space
from stages import digests

from koala.data import download as stage
from koala.data.config import DownloadConfig, DownloadMachine
from koala.data.decode import DecodeConfig
from koala.data.fetch import FetchConfig
from koala.data.shards import Sample, read_shards, shards, write_shard
from koala.data.worker_options import WorkerOptions
from koala.demo.server import TINY, ShapesServer, jpeg
from koala.disk import naming_full_disk
from koala.errors import KoalaError
from koala.run import EARLIER, STATE, NoRun

ROWS = 12  # a shard


def config(threads: int = 8, **changes: Any) -> DownloadConfig:
    values = {"image_size": 32, "encode_format": "png", "encode_quality": 1, "shard_size": ROWS}
    machine = {"threads": threads, "timeout": 1, "retries": 1}
    return DownloadConfig(**(values | {"machine": machine} | changes))


def write_table(urls: list[str]) -> Path:
    """A table in parts of ROWS rows."""
    folder = Path("table")
    folder.mkdir(exist_ok=True)
    captions = [f"caption {number} é" for number in range(len(urls))]
    scores = [number / 4 for number in range(len(urls))]
    licences = [f"by-{number}" if number % 2 else None for number in range(len(urls))]
    table = pa.table(
        {"url": urls, "caption": captions, "aesthetic": scores, "licence": licences, "id": range(len(urls))}
    )
    for part, first in enumerate(range(0, len(urls), ROWS)):
        pq.write_table(table.slice(first, ROWS), folder / f"part-{part:05d}.parquet")
    return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def sidecar(port: int) -> tuple[str, ...]:
    return (sys.executable, "-c", f"from koala.demo.server import serve; serve({port}, 1)")


def start(config: DownloadConfig) -> subprocess.Popen:
    """The stage in a process of its own, as the command line runs it."""
    code = f"""
from pathlib import Path
from koala.data.config import DownloadConfig
from koala.data.download import download
from koala.run import NoRun
download(DownloadConfig(**{config.model_dump()!r}), Path("table"), Path("out"), NoRun())
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


PATHS = ("ok", "missing", "error", "flaky", "html", "truncated", "tiny", "copy", "ok", "slow")
OUTCOMES = {
    "ok": None,
    "copy": None,
    "flaky": None,
    "tiny": None,
    "missing": "status 404",
    "error": "status 500",
    "html": "a page, no image",
    "truncated": "cut off",
    "slow": "timed out",
}


def test_a_killed_download_goes_on_and_every_fault_has_its_outcome(out: Path, recorder: Any) -> None:
    port = free_port()
    urls = [f"http://127.0.0.1:{port}/ok/{index:05d}.jpg" for index in range(ROWS)]
    urls += [f"http://127.0.0.1:{port}/{kind}/{index:05d}.jpg" for index, kind in enumerate(PATHS, start=ROWS)]
    table = write_table(urls)
    settings = config(sidecar=sidecar(port), allow=(f"127.0.0.1:{port}",))

    # Killed while its second shard waits for the slow image: nothing is left running, the first shard stands.
    first = start(settings)
    work = out / STATE / "shards"
    wait_until((work / "00000_stats.json").exists)
    assert len(mine(os.getcwd())) >= 4
    first.kill()
    first.wait()
    wait_until(lambda: not mine(os.getcwd()), 10)
    finished = (work / "00000.tar").stat()
    assert not (work / "00001_stats.json").exists(), "the test killed it too late"

    (out / "provenance.json").write_text("{}")  # a JSON file that is none of img2dataset's
    stage.download(settings, table, out, recorder)
    assert (out / "00000.tar").stat().st_mtime_ns == finished.st_mtime_ns, "a finished shard was fetched again"
    assert not mine(os.getcwd())
    files = {f"0000{shard}{end}" for shard in (0, 1) for end in (".tar", ".parquet", "_stats.json")}
    files |= {"stats.json", "manifest.json", "outcomes.png", "provenance.json"}
    assert {file.name for file in out.iterdir()} == files, "work in progress is left behind"

    rows = {
        row["url"]: row for shard in ("00000", "00001") for row in pq.read_table(out / f"{shard}.parquet").to_pylist()
    }
    for url in urls:
        error = rows[url]["error_message"]
        wanted = OUTCOMES[url.split("/")[3]]
        assert error == wanted, url
    stats = json.loads((out / "stats.json").read_text())
    assert stats["status"] == {"success": ROWS + 5, "failed_to_download": 5, "failed_to_resize": 0}
    assert stats["rows"] == len(urls)
    assert stats["success_share"] == round((ROWS + 5) / len(urls), 6)
    assert stats["errors"] == dict.fromkeys(("a page, no image", "cut off", "status 404", "status 500", "timed out"), 1)
    assert recorder.logged["success"] == ROWS + 5
    assert Image.open(out / "outcomes.png").width > 300

    samples = list(read_shards(out))
    assert [sample.meta["url"] for sample in samples] == [url for url in urls if OUTCOMES[url.split("/")[3]] is None]
    for sample in samples:
        row = urls.index(sample.meta["url"])
        assert sample.caption == f"caption {row} é"
        assert sample.meta["aesthetic"] == row / 4
        assert sample.meta["licence"] == (f"by-{row}" if row % 2 else None)
        assert sample.meta["id"] == row
        side = sample.meta["original_width"]
        assert sample.meta["original_height"] == side
        assert sample.meta["width"] == min(side, 32), "small images are not blown up"
        if side != TINY:
            assert sample.meta["sha256"] == hashlib.sha256(jpeg(1, row)).hexdigest()

    # A second call on the finished folder: the server is gone, and no process starts.
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("0*")}
    stage.download(settings, table, out, NoRun())
    assert {file.name: file.stat().st_mtime_ns for file in out.glob("0*")} == before
    assert {file.name for file in out.iterdir()} == files


def test_sigterm_leaves_nothing_behind(out: Path) -> None:
    port = free_port()
    write_table([f"http://127.0.0.1:{port}/ok/00001.jpg"])
    process = start(config(sidecar=sidecar(port)))
    wait_until(lambda: len(mine(os.getcwd())) >= 5)  # the stage, two guards, the server, img2dataset
    family = mine(os.getcwd())
    assert {os.getpgid(member.pid) for member in family} == {os.getpgid(0)}, "cancellation signals the group"
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == -signal.SIGTERM
    wait_until(lambda: not mine(os.getcwd()), 10)
    assert [file.name for file in out.iterdir()] == [STATE]


def test_nothing_downloaded_is_one_line_and_is_tried_again(
    out: Path, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, tries = write_table(["http://127.0.0.1:9/ok/00001.jpg"] * 4), []

    @contextmanager
    def guarded(command: Sequence[str], log: Path, environment: Any) -> Iterator[SimpleNamespace]:
        tries.append(json.loads(command[-1])["img2dataset"])
        shard(Path(tries[-1]["output_folder"]), 0, rows=4, successes=0)
        yield SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setattr(stage, "guarded", guarded)
    for _ in range(2):
        with pytest.raises(KoalaError, match=r"^none of 4 images could be downloaded; mostly: took N s$"):
            stage.download(config(), table, out, recorder)
        assert [file.name for file in out.iterdir()] == [STATE]
    assert len(tries) == 2
    assert not recorder.logged
    assert tries[0]["thread_count"] == 8
    assert tries[0]["url_list"] == "table"


def test_shards_do_not_reach_over_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """img2dataset shards each part by itself: 12 and 2 rows in shards of 5 are 3 and 1."""
    monkeypatch.chdir(tmp_path)
    table = write_table(["http://127.0.0.1:9/ok/00001.jpg"] * 14)
    for number, rows in enumerate((5, 5, 2)):
        shard(tmp_path, number, rows)
    started = []

    @contextmanager
    def guarded(command: Sequence[str], log: Path, environment: Any) -> Iterator[SimpleNamespace]:
        started.append(command)
        yield SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setattr(stage, "guarded", guarded)
    with pytest.raises(KoalaError, match=r"^1 of 4 shards failed"):
        stage.fetch(table, config(shard_size=5), tmp_path, tmp_path)
    shard(tmp_path, 3, 2)
    stage.fetch(table, config(shard_size=5), tmp_path, tmp_path)
    assert len(started) == 1
    with pytest.raises(KoalaError, match=r"^empty has no part-00000.parquet: make the table again"):
        stage.fetch(Path("empty"), config(), tmp_path, tmp_path)


def test_another_speed_or_route_resumes() -> None:
    one, other = config(), config(threads=1, sidecar=("a", "tunnel"))
    assert one.resume_key() == other.resume_key() != config(image_size=64).resume_key()
    assert one.recipe() != other.recipe() == config(sidecar=("a", "tunnel"), machine=DownloadMachine()).recipe()


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on loopback inside the block; the host and port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def deadly() -> Iterator[SimpleNamespace]:
    """A server whose path /kill/N.png kills the process that asks, as often as `lives` has left of N."""
    lives: dict[str, int] = {}

    class Deadly(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _, kind, name = self.path.split("/")
            if kind == "kill" and lives.get(name, 0):
                lives[name] -= 1
                ends = self.client_address, self.server.server_address
                asks = (each.pid for each in psutil.net_connections("tcp") if (each.laddr, each.raddr) == ends)
                os.kill(next(filter(None, asks)), signal.SIGKILL)  # ports of closed connections are nobody's
                return
            body = jpeg(1, int(name.partition(".")[0]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with served(Deadly) as place:
        yield SimpleNamespace(place=place, lives=lives)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("deaths", [1, 100])
def test_a_worker_that_is_killed_costs_its_shard_a_retry(
    out: Path, deadly: SimpleNamespace, recorder: Any, capsys: pytest.CaptureFixture[str], deaths: int
) -> None:
    """A system kills a process that takes too much memory. Its shard is done again; one that kills for ever is said."""
    kinds = ["ok"] * 7 + ["kill"] + ["ok"] * 4
    deadly.lives["7.png"] = deaths
    table = write_table([f"http://{deadly.place}/{kind}/{number}.png" for number, kind in enumerate(kinds)])
    machine = {"processes": 2, "threads": 1, "timeout": 10, "retries": 0}
    settings = config(shard_size=3, allow=(deadly.place,), machine=machine)
    if deaths == 1:
        stage.download(settings, table, out, recorder)
        assert recorder.logged["success"] == 12
        assert len(list(read_shards(out))) == 12
        return
    with pytest.raises(KoalaError, match=r"^1 of 4 shards failed: 1 shards failed 2 times \(see .*run again"):
        stage.download(settings, table, out, recorder)
    said = capsys.readouterr().err
    assert "download: a worker was killed: " in said
    assert "download: the worker of shard 2 was killed again: it may lack memory" in said
    deadly.lives.clear()
    stage.download(settings, table, out, recorder)  # the cause is gone, the finished shards are kept
    assert len(list(read_shards(out))) == 12
    wait_until(lambda: not mine(os.getcwd()), 10)  # a forked process ends a moment after its caller


def test_a_cluster_makes_the_same_shards_and_a_lost_worker_costs_a_retry(
    out: Path, deadly: SimpleNamespace, cluster: None, recorder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table([f"http://{deadly.place}/kill/{number}.png" for number in range(12)])
    settings = config(shard_size=3, allow=(deadly.place,), threads=1)
    stage.download(settings, table, out, recorder)
    deadly.lives["7.png"] = 1
    machine = settings.machine.model_copy(update={"engine": "ray", "processes": 3})
    Path("ray").mkdir()
    stage.download(settings.model_copy(update={"machine": machine}), table, Path("ray"), recorder)
    assert "download: the worker of shard 2 was lost on the cluster: it may lack memory" in capsys.readouterr().err
    assert len(list(read_shards(out))) == 12
    for file in sorted(out.glob("0*")):
        assert (Path("ray") / file.name).read_bytes() == file.read_bytes(), file.name


# A list that has changed.


def photograph(number: int) -> bytes:
    """A picture with EXIF data, as cameras write it."""
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x010F] = f"camera {number}"
    with Image.open(io.BytesIO(jpeg(1, number))) as image:
        image.save(content, "JPEG", exif=exif)
    return content.getvalue()


@pytest.fixture
def counting() -> Iterator[SimpleNamespace]:
    """A server that counts requests: good images, broken and missing ones, and hosts that are not up today."""
    asked: list[str] = []

    class Counts(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            _, kind, name = self.path.split("/")
            body = b"no picture" if kind == "broken" else photograph(int(name.partition(".")[0]))
            self.send_response({"missing": 404, "down": 503}.get(kind, 200))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with served(Counts) as place:
        yield SimpleNamespace(place=place, asked=asked)


@pytest.mark.usefixtures("forked")
def test_of_a_changed_list_only_new_urls_are_asked_for(
    out: Path, counting: SimpleNamespace, recorder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that moved keep their outcome, but for failures that may pass and a damaged shard; captions are the new list's; the
    bytes are those of a run from nothing, whose images came in another order."""
    kinds = {3: "missing", 7: "broken", 9: "down"}
    old = [f"http://{counting.place}/{kinds.get(number, 'ok')}/{number}.jpg" for number in range(20)]
    new = [f"http://{counting.place}/ok/90.jpg", *old[:5], *old[6:], f"http://{counting.place}/missing/91.jpg"]
    machine = {"threads": 4, "retries": 0, "timeout": 20}
    settings = config(shard_size=6, allow=(counting.place,), machine=machine)
    for name, urls in (("before", old), ("anew", new)):
        Path(name).mkdir()
        stage.download(settings, write_table(urls), Path(name), NoRun())
    damaged = Path("before/00003.tar")  # its rows, 18 and 19, are not taken over
    content = bytearray(damaged.read_bytes())
    content[600] ^= 1
    damaged.write_bytes(content)
    counting.asked.clear()
    (out / STATE).mkdir()
    (out / STATE / EARLIER).symlink_to(Path("before").resolve())
    stage.download(settings, write_table(new), out, recorder)
    assert sorted(counting.asked) == ["/down/9.jpg", "/missing/91.jpg", "/ok/18.jpg", "/ok/19.jpg", "/ok/90.jpg"]
    assert digests(out) == digests(Path("anew"))
    assert (recorder.logged["reused"], recorder.logged["new"]) == (16, 5)
    said = capsys.readouterr().err
    assert "16 of the rows taken over from the last run" in said
    assert "a shard of the last run is made anew: out/state/earlier/00003.tar has another content" in said
    samples = {sample.meta["url"]: sample for sample in read_shards(out)}
    assert samples[old[8]].caption == "caption 8 é"
    assert samples[old[4]].caption == "caption 5 é"
    assert samples[old[4]].meta["sha256"] == hashlib.sha256(photograph(4)).hexdigest()
    assert "camera 4" in samples[old[4]].meta["exif"]


# The sidecar.


def test_a_sidecar_that_dies_says_why(out: Path, recorder: Any) -> None:
    table = write_table([f"http://127.0.0.1:{free_port()}/ok/00001.jpg"])
    dies = config(sidecar=(sys.executable, "-c", "import sys; sys.exit('koala: the tunnel is closed')"))
    with pytest.raises(KoalaError, match=r"sidecar ended: the tunnel is closed$"):
        stage.download(dies, table, out, recorder)
    assert not mine(os.getcwd())


def test_a_sidecar_whose_port_is_taken_stops_the_download(out: Path, recorder: Any, server: ShapesServer) -> None:
    """What listens there may be anything: its images are not the table's."""
    table = write_table([f"{server.url}/ok/00001.jpg"])
    with pytest.raises(KoalaError, match=f"download.sidecar ended: .*port {server.server_port} is in use"):
        stage.download(config(sidecar=sidecar(server.server_port)), table, out, recorder)
    assert not mine(os.getcwd())
    assert [file.name for file in out.iterdir()] == [STATE]


def test_a_sidecar_that_does_not_serve_is_given_up(out: Path, recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    table = write_table([f"http://127.0.0.1:{port}/ok/00001.jpg"])
    monkeypatch.setattr(stage, "SIDECAR_SECONDS", 0.3)
    with pytest.raises(KoalaError, match=f"download.sidecar runs, but 127.0.0.1:{port} accepts no connection"):
        stage.download(config(sidecar=("sleep", "60")), table, out, recorder)
    assert not mine(os.getcwd())


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("how", ["files", "disk"])
def test_a_full_disk_is_said_and_the_next_run_resumes(out: Path, server: ShapesServer, recorder: Any, how: str) -> None:
    port = server.server_address[1]
    table = write_table([f"http://127.0.0.1:{port}/ok/{index:05d}.jpg" for index in range(2 * ROWS)])
    settings = config(allow=(f"127.0.0.1:{port}",), image_size=64)
    with short_of_space(out, how) as grow:
        for _ in range(2 if how == "disk" else 6):  # enough for the files that tell the rows, not for a shard
            grow()
        with pytest.raises(KoalaError, match=r"^the disk is full at out/state/shards \("), naming_full_disk(out):
            stage.download(settings, table, out, recorder)
        wait_until(lambda: not mine(os.getcwd()), 10)
        for _ in range(12):
            grow()
        stage.download(settings, table, out, recorder)
        assert [sample.meta["url"] for sample in read_shards(out)] == urls_of(table)


@pytest.mark.usefixtures("forked")
def test_killed_again_and_again_it_fetches_each_image_once(out: Path, server: ShapesServer, recorder: Any) -> None:
    port = server.server_address[1]
    table = write_table([f"http://127.0.0.1:{port}/ok/{index:05d}.jpg" for index in range(3 * ROWS)])
    settings = config(allow=(f"127.0.0.1:{port}",))
    Path("whole").mkdir()
    began = time.monotonic()
    stage.download(settings, table, Path("whole"), recorder)
    seconds, chance = time.monotonic() - began, random.Random(0)
    for _ in range(3):
        killed = start(settings)
        with suppress(subprocess.TimeoutExpired):
            killed.wait(chance.uniform(seconds / 2, 1.5 * seconds))
        killed.kill()
        killed.wait()
    stage.download(settings, table, out, recorder)
    assert [sample.meta["url"] for sample in read_shards(out)] == urls_of(table)
    assert digests(out) == digests(Path("whole"))


def urls_of(table: Path) -> list[str]:
    return [url for part in sorted(table.glob("*.parquet")) for url in pq.read_table(part)["url"].to_pylist()]


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
    samples = [Sample(f"{index:09d}", b"x", "jpg", "a caption", {}) for index in range(successes)]
    write_shard(folder / f"{number:05d}.tar", samples, folder / "unfinished")


def test_shards_that_are_not_whole_are_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(tmp_path, 0)
    shard(tmp_path, 1, successes=0)  # the network was down
    shard(tmp_path, 2, counted=5)  # a row was lost on its way to the disk
    (tmp_path / "00003_stats.json").write_text('{"count": 4, ')  # killed while it was written
    shard(tmp_path, 4)
    write_shard(tmp_path / "00004.tar", [], tmp_path / "unfinished")  # lost its images
    shard(tmp_path, 5)
    os.truncate(tmp_path / "00005.parquet", 100)
    shard(tmp_path, 6)
    os.truncate(tmp_path / "00006.tar", 700)
    stage._discard_unfinished(tmp_path)
    assert [file.name for file in tmp_path.glob("*_stats.json")] == ["00000_stats.json"]
    assert len(shards(tmp_path)) == 6
    said = capsys.readouterr().err
    assert "shard 00004 must be fetched again" in said
    assert "00004.tar holds 0 images, where 00004_stats.json counts 2" in said
    assert "00005.parquet is truncated" in said
    assert "00006.tar is truncated" in said


def test_statistics_add_up_and_group_messages(tmp_path: Path) -> None:
    shard(tmp_path, 1)
    shard(tmp_path, 22, successes=3)
    assert stage.summarise(tmp_path) == {
        "rows": 8,
        "success_share": 0.625,
        "status": {"success": 5, "failed_to_download": 3, "failed_to_resize": 0},
        "errors": {"took N s": 3},
    }


def test_messages_of_servers_command_no_terminal_and_no_plot(tmp_path: Path) -> None:
    message = "status 404: \x1b[2J$\\frac{1$"
    assert stage._kind_of_error(message) == "status 404: [2J$\\frac{N$"
    stats = {"rows": 1, "status": {"success": 0}, "errors": {stage._kind_of_error(message): 1}}
    stage.plot(stats).savefig(tmp_path / "plot.png")


def test_what_is_told_of_finished_shards_is_yielded_once_and_nothing_else_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    told = (folder / stage.FINISHED).open("w", buffering=1)
    for number, rows in enumerate((4, 5, 6)):
        shard(folder, number, rows=rows)
    (folder / "00001_stats.json").unlink()  # another machine's, not seen yet
    turns = iter([("0\n", None), ("", None), ("1\n2\n", 0)])

    def poll() -> int | None:
        lines, status = next(turns)
        told.write(lines)
        return status

    monkeypatch.setattr(stage, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(stage, "_stats", None)
    watched = stage._watch(SimpleNamespace(poll=poll), None, folder, config(), tmp_path)
    assert list(watched) == [4, 0, 6]
    told.close()


def test_a_worker_that_was_lost_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / stage.FINISHED).touch()
    now = iter(range(0, 10**6, 100))
    clock = SimpleNamespace(monotonic=lambda: next(now), sleep=lambda seconds: None)
    monkeypatch.setattr(stage, "time", clock)  # other threads have clocks too
    settings = config(machine={"deadline": 1, "retries": 1, "threads": 8})
    with subprocess.Popen(["sleep", "60"]) as hangs:
        with pytest.raises(KoalaError, match="img2dataset has stood still for 400 s"):
            list(stage._watch(hangs, None, tmp_path, settings, tmp_path))
        hangs.kill()


def test_png_takes_a_compression() -> None:
    with pytest.raises(ValidationError, match="encode_quality of png"):
        config(encode_quality=95)


def test_a_shard_whose_process_was_killed_before_it_could_say_so_is_not_made_again(tmp_path: Path) -> None:
    """A pool gives up all results that it was not told of when one of its processes is killed."""
    from koala.data import workers

    options = WorkerOptions(engine="processes", fetch=FetchConfig(), allow=(), decode=DecodeConfig(), img2dataset={})
    downloader = workers.Downloader.__new__(workers.Downloader)
    vars(downloader).update(output_folder=str(tmp_path), oom_shard_count=5, _options=options)
    row = (3, str(tmp_path / "3.feather"))
    assert downloader(row) == (False, row)  # a machine that does not see the rows
    (tmp_path / "00003_stats.json").write_text("{}")
    assert downloader(row) == (True, row)


def test_an_error_that_nobody_foresaw_is_the_outcome_of_its_url() -> None:
    """In a thread of img2dataset it would leave the whole shard waiting for this row."""
    from koala.data import workers
    from koala.data.fetch import is_final

    class Broken:
        def fetch(self, url: str) -> None:
            raise RecursionError(url)

    key, stream, cause = workers._fetch(Broken(), {}, workers.FullDisk(), (7, "http://example.org/a.png"))
    assert (key, stream, cause) == (7, None, "RecursionError while it was fetched")
    assert not is_final(cause)
