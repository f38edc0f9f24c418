"""A stage's surroundings without MLflow: a folder of its own, a recorder for what it logs, servers on loopback."""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from koala.demo.server import ShapesServer


class Recorder:
    """What a stage told its run."""

    def __init__(self) -> None:
        self.logged: dict[str, float] = {}
        self.tagged: dict[str, str] = {}
        self.files: list[str] = []

    def metrics(self, values: dict[str, float], step: int | None = None) -> None:
        self.logged |= values

    def tags(self, values: dict[str, str]) -> None:
        self.tagged |= values

    def figure(self, figure: Any, name: str) -> None:
        self.files.append(name)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        assert path.is_file()
        self.files.append(path.name)


class Stages(SimpleNamespace):
    """Parameters of the data stages, with the folders that koala.config.Params gives them."""

    def out(self, stage: str) -> Path:
        return Path("artifacts", "test", stage)

    def need(self, stage: str) -> Path:
        assert self.out(stage).is_dir()
        return self.out(stage)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    monkeypatch.chdir(tmp_path)
    return Stages(profile="test")


@pytest.fixture
def server() -> Iterator[ShapesServer]:
    with ShapesServer(port=0, seed=1) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
