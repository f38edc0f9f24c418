"""A teacher from the Hub: fetched over HTTP from a server that speaks as much of the Hub as that takes."""

import json
import shutil
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from pydantic import ValidationError

from koala.config import load
from koala.distill.batches import TrainingSet
from koala.errors import KoalaError
from koala.teacher import HubPart, HubTeacherConfig, fetch

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Repositories are folders of `root`, each at one revision."""

    root: Path
    asked: list[str]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if path.startswith("/api/models/"):
            name, _, rest = path.removeprefix("/api/models/").partition("/tree/")
            folder = self.root / name
            if not folder.is_dir() or rest != REVISION:
                return self.answer(404, error="RepoNotFound")
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            listed = [
                {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": "0" * 40}
                for file in files
            ]
            return self.answer(200, json.dumps(listed).encode())
        name, _, wanted = path[1:].partition(f"/resolve/{REVISION}/")
        file = self.root / name / wanted
        return self.answer(200, file.read_bytes()) if file.is_file() else self.answer(404, error="EntryNotFound")

    do_HEAD = do_GET

    def answer(self, code: int, content: bytes = b"", error: str | None = None) -> None:
        self.send_response(code)
        self.send_header("ETag", f'"{hash(self.path)}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("Content-Length", str(len(content)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(workspace: Path, tmp_path: Path, tiny_teacher: Path, as_hub: Callable[[type[Hub]], None]) -> type[Hub]:
    """`us/sdxl`, a whole pipeline; `us/fast`, a U-Net alone, under a name of its own, and what must not be fetched."""
    root = tmp_path / "hub"
    shutil.copytree(tiny_teacher, root / "us/sdxl")
    (root / "us/sdxl/unet/pytorch_model.bin").write_bytes(b"a pickle")
    fast = StableDiffusionXLPipeline.from_pretrained(tiny_teacher, use_safetensors=True).unet
    with torch.no_grad():
        fast.conv_in.weight.fill_(0.5)
    fast.save_pretrained(tmp_path / "fast")
    (root / "us/fast").mkdir(parents=True)
    shutil.copy(tmp_path / "fast/diffusion_pytorch_model.safetensors", root / "us/fast/four_steps.safetensors")
    (root / "us/fast/run_me.py").write_text("raise SystemExit")

    handler = type("Handler", (Hub,), {"root": root, "asked": []})
    as_hub(handler)
    return handler


FAST = {"repository": "us/fast", "revision": REVISION, "files": ["four_steps.safetensors"]}


def teacher(**changes: Any) -> HubTeacherConfig:
    return HubTeacherConfig(kind="hub", repository="us/sdxl", revision=REVISION, **changes)


def test_a_few_step_teacher_is_a_unet_in_anothers_pipeline(hub: type[Hub]) -> None:
    folder = fetch(teacher(unet=FAST, scheduler={"timestep_spacing": "trailing", "steps_offset": 1}))
    assert '"steps_offset": 1,' in (folder / "scheduler/scheduler_config.json").read_text()  # a whole number stays one
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    assert (pipeline.unet.conv_in.weight == 0.5).all()
    # Four steps of Euler at the timesteps that such a teacher was made for.
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    fetched = {path.removeprefix(f"/us/sdxl/resolve/{REVISION}/") for path in hub.asked if "us/sdxl/resolve" in path}
    assert "vae/diffusion_pytorch_model.safetensors" in fetched
    assert "unet/diffusion_pytorch_model.safetensors" not in fetched  # gigabytes that nobody would use
    assert not any(path.endswith((".bin", ".py")) for path in hub.asked)


def test_what_is_there_is_not_fetched_again(hub: type[Hub]) -> None:
    config = teacher(unet=FAST)
    fetch(config)
    weights = [path for path in hub.asked if path.endswith(".safetensors")]
    hub.asked.clear()
    fetch(config)
    assert weights and not [path for path in hub.asked if path.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"repository": "us/nobodys"},
            r"the teacher's us/nobodys from .* \(RepositoryNotFoundError\): check",
        ),
        (
            {"unet": {**FAST, "files": ["eight_steps.safetensors"]}},
            r"teacher's us/fast .*\(it has no eight_steps\.safetensors\): check",
        ),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(hub: type[Hub], changes: dict[str, Any], line: str) -> None:
    with pytest.raises(KoalaError, match=line):
        fetch(teacher().model_copy(update=HubTeacherConfig(**{**teacher().model_dump(), **changes}).__dict__))


@pytest.mark.parametrize("files", [[], ["a.bin"], ["a.safetensors", "b.safetensors"], ["a.safetensors", "code.py"]])
def test_a_part_is_data_alone(files: list[str]) -> None:
    with pytest.raises(ValidationError, match=r"one \.safetensors file, and \.json files"):
        HubPart(repository="us/fast", revision=REVISION, files=files)


@pytest.mark.parametrize(("profile", "size"), [("sdxl-turbo", 512), ("sdxl-lightning", 1024)])
def test_profiles_of_few_step_teachers(workspace: Path, profile: str, size: int) -> None:
    """Their timesteps are those at which their own sampler of four steps evaluates them; their resolution is theirs."""
    from diffusers import EulerDiscreteScheduler

    params = load(profile=profile)
    scheduler = EulerDiscreteScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(params.distill.validation_steps)
    assert sorted(scheduler.timesteps.tolist()) == list(params.distill.timesteps or ())
    assert max(min(bucket) for bucket in params.encode.buckets) == params.download.image_size == size
    assert params.distill.caption_dropout == params.distill.validation_guidance == params.evaluate.guidance == 0


def test_timesteps_that_the_teacher_does_not_have_are_refused(
    distillable: Path, change_params: Callable[..., None]
) -> None:
    change_params(distill={"timesteps": [499, 1000]})
    with pytest.raises(KoalaError, match=r"distill\.timesteps has 1000, where the teacher has 0 to 999"):
        TrainingSet(None, load().distill, 1000)  # type: ignore[arg-type]
