"""A teacher from the Hub: fetched over HTTP from a server that speaks as much of the Hub as that takes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file

from koala.errors import KoalaError
from koala.run import STATE, NoRun
from koala.teacher import teacher as stage
from koala.teacher.config import HubPart, HubTeacher

REVISION = "0123456789abcdef0123456789abcdef01234567"
FAST = {"repository": "us/fast", "revision": REVISION, "files": ["four_steps.safetensors"]}
UNET = "unet/diffusion_pytorch_model.safetensors"


def config(**changes: Any) -> HubTeacher:
    return HubTeacher(**{"repository": "us/sdxl", "revision": REVISION, **changes})


def fetch(config: HubTeacher, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    stage.teacher(config, out=out, run=NoRun())
    return out


def files(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_a_few_step_teacher_is_a_unet_in_anothers_pipeline(hub: Any, tmp_path: Path) -> None:
    folder = fetch(config(unet=FAST, scheduler={"timestep_spacing": "trailing", "steps_offset": 1}), tmp_path / "out")
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


def test_what_is_there_is_not_fetched_again(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "check_weights", dies)
        with pytest.raises(KeyboardInterrupt):
            fetch(config(unet=FAST), tmp_path / "out")
    weights = [path for path in hub.asked if path.endswith(".safetensors")]
    hub.asked.clear()
    folder = fetch(config(unet=FAST), tmp_path / "out")
    assert len(set(weights)) == 4
    assert not [path for path in hub.asked if path.endswith(".safetensors")]
    StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    assert not (folder / STATE).exists()
    hub.asked.clear()
    fetch(config(unet=FAST), tmp_path / "out")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"repository": "us/nobodys"},
            r"the teacher's us/nobodys from .* \(RepositoryNotFoundError\): check",
        ),
        ({"repository": "my model"}, r"the teacher's my model from .* \(HFValidationError\): check"),
        (
            {"unet": {**FAST, "files": ["eight_steps.safetensors"]}},
            r"teacher's us/fast .*\(it has no eight_steps\.safetensors\): check",
        ),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(hub: Any, tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(KoalaError, match=line) as raised:
        fetch(config(**changes), tmp_path / "out")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("files", [[], ["a.bin"], ["a.safetensors", "b.safetensors"], ["a.safetensors", "code.py"]])
def test_a_part_is_data_alone(files: list[str]) -> None:
    with pytest.raises(ValidationError, match=r"one \.safetensors file, and \.json files"):
        HubPart(repository="us/fast", revision=REVISION, files=files)


@pytest.mark.parametrize("revision", ["main", REVISION[:-1], REVISION.upper()])
def test_a_name_that_moves_is_no_revision(revision: str) -> None:
    with pytest.raises(ValidationError, match="revision"):
        config(revision=revision)


def halve(repository: Path, plain: bool = False) -> None:
    """Give a repository its weights in float16 beside, or instead of, the plain files."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(repository, use_safetensors=True).to(torch.float16)
    pipeline.save_pretrained(repository, safe_serialization=True, variant="fp16")
    for file in repository.glob("*/*.safetensors"):
        if not plain and ".fp16." not in file.name:
            file.unlink()


def test_weights_that_are_there_only_in_half_precision_get_the_plain_name(hub: Any, tmp_path: Path) -> None:
    halve(hub.root / "us/sdxl")
    folder = fetch(config(), tmp_path / "out")
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    weights = {file for file in files(folder) if file.endswith(".safetensors")}
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    stems = {name: "diffusion_pytorch_model" if name in ("unet", "vae") else "model" for name in names}
    assert weights == {f"{name}/{stem}.safetensors" for name, stem in stems.items()}
    for file in weights:
        with safe_open(folder / file, "pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in list(tensors.keys())} <= {torch.float16, torch.int64}
    fetched = load_file(hub.root / "us/sdxl/unet/diffusion_pytorch_model.fp16.safetensors")
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(tensor, fetched[name].float())


def test_where_both_precisions_are_there_the_plain_one_is_fetched(hub: Any, tmp_path: Path, tiny_teacher: Path) -> None:
    halve(hub.root / "us/sdxl", plain=True)
    folder = fetch(config(), tmp_path / "out")
    assert (folder / UNET).read_bytes() == (tiny_teacher / UNET).read_bytes()
    assert not [path for path in hub.asked if "fp16" in path]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_come_with_their_index(hub: Any, tmp_path: Path, variant: str | None) -> None:
    repository = hub.root / "us/sdxl"
    pipeline = StableDiffusionXLPipeline.from_pretrained(repository, use_safetensors=True)
    expected = pipeline.unet.state_dict()
    shutil.rmtree(repository / "unet")
    pipeline.unet.save_pretrained(repository / "unet", variant=variant, max_shard_size="300KB")
    shutil.rmtree(repository / "text_encoder")
    pipeline.text_encoder.save_pretrained(repository / "text_encoder", variant=variant, max_shard_size="60KB")
    folder = fetch(config(), tmp_path / "out")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    assert len(list((folder / "text_encoder").glob("*-of-*.safetensors"))) > 1
    assert not [file for file in files(folder) if "fp16" in file]
    again = StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    for name, tensor in again.unet.state_dict().items():
        assert torch.equal(tensor, expected[name])
    for name, tensor in again.text_encoder.state_dict().items():
        assert torch.equal(tensor, pipeline.text_encoder.state_dict()[name])


def test_a_shard_that_is_missing_is_one_line(hub: Any, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(hub.root / "us/sdxl/unet")
    shutil.rmtree(hub.root / "us/sdxl/unet")
    unet.save_pretrained(hub.root / "us/sdxl/unet", max_shard_size="300KB")
    missing = sorted((hub.root / "us/sdxl/unet").glob("*-00002-of-*.safetensors"))[0]
    missing.unlink()
    with pytest.raises(KoalaError, match=rf"us/sdxl: unet lacks {missing.name}, which its .*index\.json names: fetch"):
        fetch(config(), tmp_path / "out")


def test_pickles_alone_are_refused(hub: Any, tmp_path: Path) -> None:
    (hub.root / "us/sdxl" / UNET).unlink()
    with pytest.raises(KoalaError, match=r"us/sdxl: unet is there only as a pickle.*: convert it to safetensors"):
        fetch(config(), tmp_path / "out")
    assert not [path for path in hub.asked if path.endswith(".bin")]


def test_a_wrong_teacher_is_refused_before_its_weights_are_fetched(hub: Any, tmp_path: Path) -> None:
    file = hub.root / "us/sdxl/scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(KoalaError, match="us/sdxl: its scheduler's prediction_type is sample"):
        fetch(config(), tmp_path / "out")
    assert not [path for path in hub.asked if path.endswith(".safetensors")]


def test_only_what_the_index_names_is_fetched(hub: Any, tmp_path: Path) -> None:
    repository = hub.root / "us/sdxl"
    (repository / "sd_xl_base.safetensors").write_bytes(b"the same again, in the original layout")
    shutil.copytree(repository / "vae", repository / "vae_1_0")
    (repository / "unet/custom.py").write_text("raise SystemExit")
    (repository / "README.md").write_text("words")
    (repository / "LICENSE.md").write_text("use restrictions")
    folder = fetch(config(), tmp_path / "out")
    kept = {path.name for path in folder.iterdir()}
    parts = {"unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"}
    assert kept == {"model_index.json", "teacher.json", "LICENSE.md", *parts}
    assert (folder / "LICENSE.md").read_text() == "use restrictions"
    assert not [file for file in files(folder) if not file.endswith((".json", ".txt", ".safetensors", "LICENSE.md"))]
    assert not [
        path for path in hub.asked if path.endswith((".py", "README.md", "sd_xl_base.safetensors")) or "vae_1_0" in path
    ]


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a.safetensors"]}, {"weight_map": {"conv_in.weight": 1}}])
def test_an_index_that_names_no_shards_is_one_line(hub: Any, tmp_path: Path, index: dict[str, Any]) -> None:
    unet = UNet2DConditionModel.from_pretrained(hub.root / "us/sdxl/unet")
    shutil.rmtree(hub.root / "us/sdxl/unet")
    unet.save_pretrained(hub.root / "us/sdxl/unet", max_shard_size="300KB")
    next((hub.root / "us/sdxl/unet").glob("*.index.json")).write_text(json.dumps(index))
    with pytest.raises(KoalaError, match=r"index\.json has no weight_map that names the file of each tensor: fetch"):
        fetch(config(), tmp_path / "out")
