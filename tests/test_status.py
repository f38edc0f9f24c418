"""`koala status`: each part as it is, and one that is down as a line."""

import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from koala import params as parameters
from koala import status as module
from koala.publish.targets.folder import FolderTarget

RUNS = [
    {
        "name": "distill koala-1b",
        "state_name": "Late",
        "state_type": "SCHEDULED",
        "expected_start_time": "2026-01-02T03:04:05Z",
    },
    {
        "name": "distill@koala-700m",
        "state_name": "Running",
        "state_type": "RUNNING",
        "work_pool_name": "gpu",
        "labels": {"process.host": "mars"},
        "start_time": "2026-01-02T03:05:06Z",
    },
]


class Prefect(BaseHTTPRequestHandler):
    asked: ClassVar[list[tuple[str, str | None, dict]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, self.headers["Authorization"], body))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(RUNS).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def prefect(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = HTTPServer(("127.0.0.1", 0), Prefect)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{server.server_port}/api")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "koala:word")
    yield
    server.shutdown()
    server.server_close()


@pytest.fixture
def project(workspace: Path) -> Path:
    """A DVC project of which nothing was run, with a target that holds one release."""
    params = workspace / "params.yaml"
    document = yaml.safe_load(params.read_text())
    document["profiles"]["smoke"]["publish"]["targets"] = {"folder": {"path": str(workspace / "shelf")}}
    params.write_text(yaml.safe_dump(document))
    (workspace / "release").mkdir()
    (workspace / "release/README.md").touch()
    FolderTarget(path=workspace / "shelf").send(workspace / "release", "koala-700m")
    (workspace / ".dvc").mkdir()
    subprocess.run(["git", "init", "--quiet"], check=True)
    (workspace / "koala").symlink_to(Path(module.__file__).parent)
    return workspace


@pytest.mark.usefixtures("prefect")
def test_all_parts_on_one_screen_and_as_json(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module.status(as_json=True, seconds=120)
    found = json.loads(capsys.readouterr().out)
    assert found["profile"] == "smoke"
    assert [(run["name"], run["pool"], run["host"]) for run in found["flow runs"]] == [
        ("distill@koala-700m", "gpu", "mars"),  # what runs comes first
        ("distill koala-1b", "-", "-"),
    ]
    assert found["champions"] == {"koala-1b": "none", "koala-700m": "v1 (target folder)"}
    assert found["data"]["rows"] == 120
    assert found["data"]["kind"] == "shapes"
    assert found["data"]["pin"] == "made by the project: none needed"
    assert {"source", "publish@koala-1b"} <= set(found["to compute"])
    path, login, body = Prefect.asked[-1]
    assert (path, login) == ("/api/flow_runs/filter", "Basic a29hbGE6d29yZA==")
    assert "PAUSED" in body["flow_runs"]["state"]["type"]["any_"]

    module.status(as_json=False, seconds=120)
    screen = capsys.readouterr().out
    assert "koala-700m  v1 (target folder)" in screen
    assert len(screen.splitlines()) < 40


def test_a_server_that_is_down_or_silent_is_a_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    module.status(as_json=False, seconds=60)
    assert "not known: Prefect at http://127.0.0.1:9/api: [Errno 111] Connection refused" in capsys.readouterr().out
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/api")
        start = time.monotonic()
        loaded = parameters.load()
        found = module.within(1, {"runs": lambda: module.flow_runs(30), "champions": lambda: module.champions(loaded)})
        assert time.monotonic() - start < 10
    assert found["runs"] == {"error": "no answer in 1 s"}
    assert found["champions"]["koala-700m"] == "v1 (target folder)"


def test_the_data_is_shown_at_its_pin(edited: Callable[[dict | None], dict]) -> None:
    pin = {"location": "s3://bucket/list.parquet", "files": {"list.parquet": "etag"}, "rows": 7}
    assert edited(None) == {
        "kind": "s3",
        "location": "s3://bucket/list.parquet",
        "rows": None,
        "pin": "none: `koala data update` pins it",
    }
    found = edited(pin)
    assert found["rows"] == 7
    assert found["pin"].startswith("1 files (pin ")
    assert edited({**pin, "commit": "abc"})["pin"].startswith("commit abc (pin ")


@pytest.fixture
def edited(workspace: Path) -> Callable[[dict | None], dict]:
    """What is shown of a list on S3 with a pin."""

    def shown(pin: dict | None) -> dict:
        document = yaml.safe_load((workspace / "params.yaml").read_text())
        document["profiles"]["smoke"]["source"] = {"kind": "s3", "location": "s3://bucket/list.parquet"}
        document["profiles"]["smoke"]["source"]["score_columns"] = ["aesthetic"]
        (workspace / "params.yaml").write_text(yaml.safe_dump(document))
        (workspace / "source.lock.yaml").write_text(yaml.safe_dump({"smoke": pin} if pin else {}))
        return module.data(parameters.load())

    return shown
