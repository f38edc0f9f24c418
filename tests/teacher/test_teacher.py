"""The stage: a folder taken as it is, and a teacher that is never a mixture of two."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from pydantic import ValidationError

from koala.errors import KoalaError
from koala.run import STATE, NoRun
from koala.teacher import teacher as stage
from koala.teacher.config import FileTeacher, FolderTeacher, LoraPart
from koala.teacher.layout import weights

PARTS = {"unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"}


def make(out: Path, **options: Any) -> Path:
    out.mkdir(exist_ok=True)
    stage.teacher(FolderTeacher(**options), out=out, run=NoRun())
    return out


def contents(folder: Path) -> dict[str, bytes]:
    found = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in found.items()}


def test_a_folder_is_copied_byte_for_byte_and_left_alone(pipeline: Path, tmp_path: Path) -> None:
    (pipeline / "unet/pytorch_model.bin").write_bytes(b"a pickle")
    (pipeline / "unet/module.py").write_text("raise SystemExit")
    (pipeline / "samples").mkdir()
    (pipeline / "samples/config.json").write_text("{}")
    (pipeline / "provenance.json").write_text("{}")
    before = contents(pipeline)
    out = make(tmp_path / "out", path=pipeline)
    extra = {"unet/pytorch_model.bin", "unet/module.py", "samples/config.json", "provenance.json"}
    assert {**contents(out), "teacher.json": b""} == {
        **{name: content for name, content in before.items() if name not in extra},
        "teacher.json": b"",
    }
    assert contents(pipeline) == before
    # DVC makes what it caches read-only: a link to the user's own file would make that read-only too.
    assert all(file.stat().st_nlink == 1 for file in pipeline.rglob("*") if file.is_file())
    assert json.loads((out / "teacher.json").read_text())["config"]["path"] == str(pipeline)


def test_parts_that_a_teacher_does_not_have_are_left_out(pipeline: Path, tmp_path: Path) -> None:
    """A pipeline that was saved with an IP-Adapter loaded names its image encoder."""
    index = json.loads((pipeline / "model_index.json").read_text())
    index |= {
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    (pipeline / "model_index.json").write_text(json.dumps(index))
    (pipeline / "image_encoder").mkdir()
    (pipeline / "image_encoder/config.json").write_text("{}")
    out = make(tmp_path / "out", path=pipeline)
    assert not (out / "image_encoder").exists()
    StableDiffusionXLPipeline.from_pretrained(out, local_files_only=True, add_watermarker=False)  # it is whole


@pytest.mark.parametrize("name", ["LICENSE.md", "LICENSE", "LICENSE.txt"])
def test_a_licence_comes_along(pipeline: Path, tmp_path: Path, name: str) -> None:
    (pipeline / name).write_text("use restrictions")
    assert (make(tmp_path / "out", path=pipeline) / "LICENSE.md").read_text() == "use restrictions"


def test_a_folder_of_symbolic_links_is_copied_as_files(pipeline: Path, tmp_path: Path) -> None:
    linked = tmp_path / "snapshot"
    for file in pipeline.rglob("*"):
        if file.is_file():
            link = linked / file.relative_to(pipeline)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    out = make(tmp_path / "out", path=linked)
    assert not any(file.is_symlink() for file in out.rglob("*"))
    assert contents(out).keys() - {"teacher.json"} == contents(pipeline).keys()


def test_half_precision_alone_and_shards_are_taken_from_a_folder(pipeline: Path, tmp_path: Path) -> None:
    loaded = StableDiffusionXLPipeline.from_pretrained(pipeline, use_safetensors=True)
    loaded.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="100KB")
    out = make(tmp_path / "out", path=tmp_path / "half")
    again = StableDiffusionXLPipeline.from_pretrained(
        out, use_safetensors=True, local_files_only=True, torch_dtype=torch.float16
    )
    assert len(list((out / "unet").glob("*.safetensors"))) > 1
    assert not [name for name in contents(out) if "fp16" in name]
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        expected = getattr(loaded, part).state_dict()
        for name, tensor in getattr(again, part).state_dict().items():
            assert torch.equal(tensor, expected[name])
            assert tensor.dtype == expected[name].dtype


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors"], {"model.safetensors": "model.safetensors"}),
        (["model.bf16.safetensors", "model.fp16.safetensors"], {"model.fp16.safetensors": "model.safetensors"}),
        (["model.non_ema.safetensors", "model.fp16.safetensors"], {"model.fp16.safetensors": "model.safetensors"}),
        (
            # As older diffusers wrote them, beside one file that an adapter left.
            [
                "model-00001-of-00002.fp16.safetensors",
                "model-00002-of-00002.fp16.safetensors",
                "model.safetensors.index.fp16.json",
                "adapter_model.safetensors",
            ],
            {
                "model-00001-of-00002.fp16.safetensors": "model-00001-of-00002.safetensors",
                "model-00002-of-00002.fp16.safetensors": "model-00002-of-00002.safetensors",
                "model.safetensors.index.fp16.json": "model.safetensors.index.json",
            },
        ),
    ],
)
def test_which_weights_are_taken(files: list[str], chosen: dict[str, str]) -> None:
    found = weights([f"text_encoder/{file}" for file in files], "text_encoder", "us")
    assert found == {f"text_encoder/{file}": f"text_encoder/{name}" for file, name in chosen.items()}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("nowhere", "there is no teacher at .*nowhere: give the folder of a pipeline"),
        ("model.safetensors", "model.safetensors is a file, not a folder: set `kind: file`"),
        ("empty", "model_index.json is missing"),
    ],
)
def test_what_is_no_pipeline_folder_is_one_line(tmp_path: Path, name: str, line: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(KoalaError, match=line):
        make(tmp_path / "out", path=tmp_path / name)


def test_a_file_is_safetensors() -> None:
    with pytest.raises(ValidationError, match=r"must be a \.safetensors file, not 'model\.ckpt': convert it first"):
        FileTeacher(path=Path("model.ckpt"))
    with pytest.raises(ValidationError, match=r"must be a \.safetensors file, not 'style\.pt'"):
        LoraPart(file=Path("style.pt"))


def test_an_earlier_teacher_leaves_nothing(pipeline: Path, tmp_path: Path) -> None:
    """A teacher by hand replaces the one that was there; it does not mix with it."""
    out = tmp_path / "out"
    for file in ("unet/diffusion_pytorch_model-00001-of-00002.safetensors", "image_encoder/config.json", "notes.txt"):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text("of the teacher before")
    (out / "model_index.json").write_text("{}")
    make(out, path=pipeline)
    assert {path.name for path in out.iterdir()} == {*PARTS, "model_index.json", "teacher.json"}
    assert contents(out).keys() - {"teacher.json"} == contents(pipeline).keys()


@pytest.mark.parametrize("moves", range(9))
def test_a_teacher_that_was_interrupted_in_moving_is_never_a_mixture(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    out = tmp_path / "out"
    shutil.copytree(pipeline, out)
    (out / "unet/of_the_old").write_text("")
    done = []
    move = os.replace

    def dies(source: Path, target: Path) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(target)
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            make(out, path=pipeline)
    assert not (out / "teacher.json").exists()
    assert not (out / "unet/of_the_old").exists()
    assert (out / "model_index.json").exists() == (moves == 8)
    make(out, path=pipeline)
    assert contents(out).keys() - {"teacher.json"} == contents(pipeline).keys()
    assert not (out / STATE).exists()


def test_unfinished_work_of_another_teacher_is_not_used(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        with pytest.raises(KeyboardInterrupt):
            make(out, path=pipeline)
    (out / STATE / "pipeline.partial").rename(out / STATE / "pipeline")  # as if it was whole
    make(out, path=pipeline, scheduler={"steps_offset": 7})
    assert json.loads((out / "scheduler/scheduler_config.json").read_text())["steps_offset"] == 7
