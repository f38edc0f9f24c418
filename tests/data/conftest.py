"""A folder for a stage's results, and the demo's server on loopback."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from koala.demo.server import ShapesServer


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder `out` in the current folder, which is the test's own."""
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    return Path("out")


@pytest.fixture(scope="module")
def server() -> Iterator[ShapesServer]:
    with ShapesServer(port=0, seed=1) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster of this machine, where processes that are started find it too."""
    import ray
    import shares

    environment = {"env_vars": {"PYTHONPATH": str(Path(shares.__file__).parent)}}
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        yield
    ray.shutdown()


@pytest.fixture(scope="session")
def stage_inputs(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_clip: Path) -> Path:
    """What the stages of tests/stages.py read."""
    import torch
    from captioner import blip
    from stages import make_inputs

    captioner = tmp_path_factory.mktemp("captioner")
    torch.manual_seed(0)
    blip(captioner, tiny_teacher)
    return make_inputs(tmp_path_factory.mktemp("inputs"), tiny_teacher, tiny_clip, captioner)
