"""What tests of several packages share: a workspace of their own, and models and latents a few numbers wide."""

import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    from koala.cli import QUIET

    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables, which take seconds to make, and nothing else."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    """A folder with params.yaml at profile `smoke`, infra/, and an MLflow store of its own; the current folder."""
    document = yaml.safe_load((ROOT / "params.yaml").read_text())
    document["profile"] = "smoke"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(document))
    (tmp_path / "infra").symlink_to(ROOT / "infra")
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


@pytest.fixture
def change_params(workspace: Path) -> Callable[..., None]:
    """Set values of profile `smoke` in the workspace: `change_params(distill={"steps": 4})`."""

    def change(**sections: dict) -> None:
        file = workspace / "params.yaml"
        document = yaml.safe_load(file.read_text())
        for section, values in sections.items():
            document["profiles"]["smoke"][section] |= values
        file.write_text(yaml.safe_dump(document))

    return change


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an SDXL pipeline with random weights, small enough for a step to take milliseconds."""
    from diffusers import AutoencoderKL

    from koala.demo.config import FitConfig, TinyTeacherConfig
    from koala.demo.teacher import build_pipeline

    torch.manual_seed(0)
    fit = FitConfig(steps=1, batch_size=1, learning_rate=1e-3)
    config = TinyTeacherConfig(
        kind="tiny", unet_channels=(16, 32, 32), unet_depths=(0, 1, 2), text_width=32, vae=fit, unet=fit
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        sample_size=32,
    )
    folder = tmp_path_factory.mktemp("teacher")
    build_pipeline(config, vae).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def as_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[type[BaseHTTPRequestHandler]], None]]:
    """Have a handler answer in place of the Hugging Face Hub, on loopback: `as_hub(Handler)`."""
    from huggingface_hub import constants

    servers = []

    def serve(handler: type[BaseHTTPRequestHandler]) -> None:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def distillable(workspace: Path, tiny_teacher: Path) -> Path:
    """A workspace whose stages before `distill` have run: teacher, 37 latents in two buckets, both students."""
    from koala import config
    from koala.bench.models import random_latents
    from koala.unet.build import run as build

    class Recorder:
        def __getattr__(self, _: str) -> Callable[..., None]:
            return lambda *args, **kwargs: None

    params = config.load()
    shutil.copytree(tiny_teacher, params.out("teacher"))
    random_latents(params.out("encode"), {(32, 32): 29, (32, 64): 8}, factor=4)
    for student in params.students:
        build(params, Recorder(), student)
    return workspace
