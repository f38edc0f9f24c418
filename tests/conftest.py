"""What tests of several packages share: a workspace of their own, and models and latents a few numbers wide."""

import gc
import json
import multiprocessing
import multiprocessing.spawn
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import yaml
from filelock import FileLock

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """Keep what is imported from being looked through at each collection of garbage: half a second, with two million objects."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    from koala.cli import QUIET

    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")  # tests of it ask for it


# Files whose tests start processes of their own, or take more than a few seconds: `make test-fast` leaves them out.
SLOW = (
    "bench/test_bench.py",
    "data/test_download.py",
    "data/test_executor.py",
    "data/test_duplicates.py",
    "data/test_fetch.py",
    "data/test_full_disk.py",
    "data/test_killed.py",
    "data/test_recaption.py",
    "data/test_score.py",
    "distill/test_captions.py",
    "distill/test_task.py",
    "data/test_encode.py",
    "distill/test_held_out.py",
    "distill/test_launch.py",
    "distill/test_machines.py",
    "distill/test_memory.py",
    "distill/test_remote_checkpoints.py",
    "distill/test_resume.py",
    "distill/test_trainer.py",
    "distill/test_validation.py",
    "distill/test_float8.py",
    "evaluate/test_evaluate.py",
    "evaluate/test_images.py",
    "flows/",
    "infra/",
    "pipeline/",
    "publish/test_hub.py",
    "publish/test_lora.py",
    "publish/test_older.py",
    "publish/test_releases.py",
    "publish/test_single_file.py",
    "publish/test_targets.py",
    "teacher/test_hub.py",
    "test_cli.py",
    "test_dvc.py",
    "test_examples.py",
    "test_process.py",
    "test_runner.py",
    "test_status.py",
    "test_tracking.py",
    "test_ui.py",
    "unet/test_cost.py",
)


# Files that take longest, the longest first: begun first, they leave no worker alone with one at the end.
LONG = (
    "pipeline/test_smoke.py",
    "flows/test_pools.py",
    "distill/test_machines.py",
    "distill/test_resume.py",
    "distill/test_launch.py",
    "data/test_download.py",
    "flows/test_watch.py",
    "flows/test_distill.py",
    "flows/test_serve.py",
    "publish/test_targets.py",
    "publish/test_hub.py",
    "flows/test_promote.py",
    "test_dvc.py",
    "bench/test_bench.py",
    "distill/test_held_out.py",
    "distill/test_memory.py",
    "evaluate/test_evaluate.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {item: item.path.relative_to(ROOT / "tests").as_posix() for item in items}
    for item, place in places.items():
        if place.startswith(SLOW):
            item.add_marker("slow")
    items.sort(key=lambda item: LONG.index(places[item]) if places[item] in LONG else len(LONG))


def pytest_configure(config: pytest.Config) -> None:
    """Fork the workers of pytest-xdist, and what they start, from one server; a worker is a plain Python to its tests."""
    if config.getoption("numprocesses", None):
        os.environ[forks.SHARED] = str(forks.programs())
        config.option.tx = [f"popen//python={forks.programs() / 'python'}"] * len(config.option.tx)
    elif hasattr(config, "workerinput"):
        sys.executable = str(Path(sys.prefix, "bin", "python"))
        multiprocessing.set_executable(sys.executable)


def pytest_sessionfinish() -> None:
    forks.end()


class Recorder:
    """A run that remembers what a stage reported: the last value of each metric, all steps, tags, and files."""

    def __init__(self) -> None:
        self.logged: dict[str, float] = {}
        self.steps: dict[str, list[int]] = {}
        self.tagged: dict[str, str] = {}
        self.files: list[str] = []
        self.images: list[tuple[str, int]] = []
        self.registered: list[tuple[str, str, list[str], dict[str, str], str]] = []

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.logged |= values
        for name in values:
            self.steps.setdefault(name, []).append(step)

    def last_step(self, metric: str) -> int:
        return max(self.steps.get(metric, ()), default=-1)

    def tags(self, values: Mapping[str, str]) -> None:
        self.tagged |= values

    def image(self, image: Any, key: str, step: int) -> None:
        self.images.append((key, step))

    def figure(self, figure: Any, name: str) -> None:
        self.files.append(name)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        assert path.exists()
        self.files.append(path.name)

    def register(self, model: str, content: str, files: Sequence[Path], tags: Mapping[str, str], alias: str) -> None:
        self.registered.append((model, content, sorted(file.name for file in files), dict(tags), alias))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Have a file or folder made by the first worker that asks for it: `made_once("a.db", make)`, where `make` takes its path."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], object]) -> Path:
        found, partial = folder / name, folder / f"{name}.partial"
        with FileLock(folder / f"{name}.lock"):
            if not found.exists():
                make(partial)
                partial.rename(found)
        return found

    return made


@pytest.fixture(scope="session")
def empty_store(made_once: MadeOnce) -> Path:
    """An MLflow database with its tables, which take seconds to make, and nothing else: one for all workers."""
    from mlflow import MlflowClient

    return made_once("mlflow.db", lambda file: MlflowClient(f"sqlite:///{file}").search_experiments())


@pytest.fixture(scope="session")
def programs() -> Path:
    """A folder with `python`, `koala` and what else lies beside this Python: they start at once, as tests/preloaded.py says."""
    return forks.programs()


@pytest.fixture(scope="session")
def prefect_tables(made_once: MadeOnce, programs: Path) -> Path:
    """A database of Prefect with its tables, which take seconds to make, and nothing else: one for all workers."""

    def make(file: Path) -> None:
        own = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{file}"}
        command = [programs / "prefect", "server", "database", "upgrade", "--yes"]
        subprocess.run(command, env={**os.environ, **own}, check=True, capture_output=True)

    return made_once("prefect.db", make)


@pytest.fixture
def forked(programs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have every Python that this test starts, and koala for it, forked from one that has imported what they import."""
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    real = multiprocessing.spawn.get_executable()
    multiprocessing.set_executable(sys.executable)
    yield
    multiprocessing.set_executable(real)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    """A folder with params.yaml at profile `smoke`, dvc.yaml, infra/, and an MLflow store; the current folder."""
    document = yaml.load((ROOT / "params.yaml").read_text(), yaml.CSafeLoader)
    document["profile"] = "smoke"
    document["machines"]["cpu"]["distill"] |= {
        "launch": "infra/accelerate/cpu.yaml",  # one process starts sooner; two are tested where they matter
        "micro_batch": 4,
        "checkpoint_every": 2,
        "log_every": 2,
        "validate_every": 3,
    }
    document["machines"]["cpu"]["evaluate"] = {"batch_size": 3, "latency_repeats": 2}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(document))
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    for name in ("approvals.yaml", "forget.yaml", "source.lock.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "infra").symlink_to(ROOT / "infra")
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def change_params(workspace: Path) -> Callable[..., None]:
    """Set values of profile `smoke`, and of machine `cpu`: `change_params(distill={"steps": 4}, machine={"log_every": 1})`."""

    def change(machine: dict | None = None, **sections: dict) -> None:
        file = workspace / "params.yaml"
        document = yaml.safe_load(file.read_text())
        document["machines"]["cpu"]["distill"] |= machine or {}
        for section, values in sections.items():
            document["profiles"]["smoke"][section] |= values
        file.write_text(yaml.safe_dump(document))

    return change


@pytest.fixture(scope="module")
def counted_once() -> Iterator[None]:
    """Count each U-Net's operations once: it takes half a second, each time with the same result."""
    from koala.unet import cost

    known: dict[str, Any] = {}
    plain = cost.unet_cost

    def counted(config: Mapping[str, Any], latent_size: int) -> Any:
        key = json.dumps([dict(config), latent_size])
        return known.get(key) or known.setdefault(key, plain(config, latent_size))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "unet_cost", counted)
        yield


@pytest.fixture(scope="session")
def tiny_teacher(made_once: MadeOnce) -> Path:
    """The folder of an SDXL pipeline with random weights, small enough for a step to take milliseconds."""
    sizes: dict[str, Any] = {"unet_channels": (16, 32, 32), "unet_depths": (0, 1, 2), "text_width": 32}
    return made_once("teacher", lambda folder: tiny_pipeline(**sizes).save_pretrained(folder))


def tiny_pipeline(**sizes: Any) -> Any:
    """A pipeline of SDXL's classes with random weights."""
    from diffusers import AutoencoderKL

    from koala.demo.images import Shapes
    from koala.teacher.config import FitConfig, TinyTeacher
    from koala.teacher.tiny import build_pipeline

    torch.manual_seed(0)
    fit = FitConfig(steps=1, batch_size=1, learning_rate=1e-3)
    config = TinyTeacher(images=Shapes(count=8), vae=fit, unet=fit, **sizes)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        sample_size=32,
    )
    return build_pipeline(config, vae)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A CLIP model with random weights, a few numbers wide, in a folder."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher / "tokenizer")
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = layers | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = layers | {"image_size": 32, "patch_size": 16}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    size = {"shortest_edge": 32}
    images = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
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


@dataclass(frozen=True)
class Artifacts:
    """What the stages before `distill` make: folders, and both students' rules."""

    latents: Path
    captions: Path
    teacher: Path
    students: Path

    def student(self, name: str) -> Path:
        return self.students / name

    def job(self, config: Any, state: Path, student: str = "koala-700m") -> Any:
        from koala.distill.job import Job

        state.mkdir(exist_ok=True)
        return Job(
            config=config, latents=self.latents, teacher=self.teacher, student=self.student(student), state=state
        )


@pytest.fixture(scope="session")
def artifacts(tiny_teacher: Path, made_once: MadeOnce) -> Artifacts:
    """A teacher, 37 latents in two buckets, no new captions, and both students."""
    from koala.bench.models import random_latents
    from koala.params import load
    from koala.run import NoRun
    from koala.unet.student import student

    def make(folder: Path) -> None:
        random_latents(folder / "latents", {(32, 32): 29, (32, 64): 8}, factor=4)
        for name, config in load(ROOT / "params.yaml").students.items():
            (folder / "student" / name).mkdir(parents=True)
            student(config, teacher=tiny_teacher, out=folder / "student" / name, run=NoRun())
        (folder / "captions").mkdir()

    folder = made_once("artifacts", make)
    return Artifacts(folder / "latents", folder / "captions", tiny_teacher, folder / "student")


@pytest.fixture
def distillable(workspace: Path, artifacts: Artifacts) -> Path:
    """A workspace whose stages before `distill` have run."""
    made = workspace / "artifacts/smoke"
    shutil.copytree(artifacts.teacher, made / "teacher")
    shutil.copytree(artifacts.latents, made / "latents")
    shutil.copytree(artifacts.captions, made / "captions")
    shutil.copytree(artifacts.students, made / "student")
    return workspace


@pytest.fixture
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """An empty S3 server on loopback, which boto3 finds by the environment; gives its host and port."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", b"").close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    yield host, port
    server.stop()


@pytest.fixture
def strict_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of an S3 server that verifies signatures and writes to disk, with an empty bucket `koala`."""
    import boto3
    from seaweed import KEY, SECRET, seaweed

    folder = tmp_path / "weed"
    folder.mkdir()
    with seaweed(folder) as (host, port):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3 = boto3.client("s3")
        s3.create_bucket(Bucket="koala")
        yield s3


@pytest.fixture
def forget_credentials(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Take all that could give credentials for S3 out of the environment."""

    def forget() -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
        monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")

    return forget
