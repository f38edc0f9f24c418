"""Students are stock U-Nets that run, in whole pipeline folders."""

import json
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from koala.errors import KoalaError
from koala.unet.blocks import StudentRule, keep, teacher_stages
from koala.unet.config import StudentConfig
from koala.unet.reference import SDXL
from koala.unet.student import build_student, read_stages, student, student_config

DEPTHS = {
    "koala-700m": (1, [1, 2, 5], None, None),
    "koala-1b": (1, [1, 2, 6], None, "UNetMidBlock2DCrossAttn"),
    "bk-base": (1, [1, 2, 10], None, "UNetMidBlock2DCrossAttn"),
    "ssd-1b": (2, [1, 2, 4], [[4, 4, 10], [2, 1, 1], 1], "UNetMidBlock2D"),
    "vega": (2, [1, 1, 2], None, "UNetMidBlock2D"),
}
# The known students' rules have SDXL's depths in them; these have the same form for a teacher of depths 1, 1, 3.
TINY = {
    "koala-700m": None,
    "koala-1b": None,
    "ssd-1b": StudentRule(
        down_pairs=(0, 1), up_pairs=(0, 1, 2), mid="resnets", depth={"DW3": 2, "UP1": [1, 1, 3], "UP2": 1}
    ),
    "vega": StudentRule(down_pairs=(0, 1), up_pairs=(0, 1, 2), mid="resnets", depth={"DW3": 1, "UP1": 1}),
    "deeper first": StudentRule(
        down_pairs=(0, 1), up_pairs=(0, 1, 2), mid="keep", depth={"DW3": [3, 1], "UP1": [2, 2, 1]}
    ),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_a_student_of_sdxl_has_the_configuration_of_the_published_one(rules, name):
    config = student_config(dict(SDXL) | {"_class_name": "x"}, keep(SDXL, rules[name]))
    layers, depths, reverse, mid = DEPTHS[name]
    assert config == dict(SDXL) | {
        "layers_per_block": layers,
        "transformer_layers_per_block": depths,
        "reverse_transformer_layers_per_block": reverse,
        "mid_block_type": mid,
    }


@pytest.mark.parametrize("name", DEPTHS)
def test_a_students_configuration_reads_back_as_what_was_kept(rules, name):
    kept = keep(SDXL, rules[name])
    back = teacher_stages(student_config(SDXL, kept))
    assert [(stage.path, stage.depths) for stage in back] == [(stage.path, stage.depths) for stage in kept]


def test_a_way_up_deeper_than_the_way_down_is_named_by_itself():
    rule = StudentRule(down_pairs=(0,), up_pairs=(0, 2), mid="drop", depth={"DW3": 5, "UP1": 8})
    kept = keep(SDXL, rule)
    config = student_config(SDXL, kept)
    assert config["transformer_layers_per_block"] == [1, 2, 5]
    assert config["reverse_transformer_layers_per_block"] == [8, 2, 1]
    assert [stage.depths for stage in teacher_stages(config)] == [stage.depths for stage in kept]


@pytest.mark.parametrize("name", TINY)
def test_tiny_students_of_every_form_run(rules, teacher, inputs, name):
    rule = TINY[name] or rules[name]
    student = build_student(teacher, rule)
    assert type(student) is UNet2DConditionModel
    assert student.num_parameters() < teacher.num_parameters()
    with torch.no_grad():
        output = student(**inputs).sample
    assert output.shape == (2, 4, 8, 8)
    assert output.isfinite().all()
    depths = [
        tuple(len(transformer.transformer_blocks) for transformer in getattr(block, "attentions", ()))
        for block in (student.get_submodule(stage.path) for stage in keep(teacher.config, rule))
    ]
    assert depths == [tuple(depth for depth in stage.depths if depth) for stage in keep(teacher.config, rule)]


def test_a_student_that_keeps_everything_is_the_teacher(rules, teacher, inputs):
    student = build_student(teacher, rules["sdxl"])
    with torch.no_grad():
        assert torch.equal(student(**inputs).sample, teacher(**inputs).sample)


def test_a_student_can_be_the_next_teacher(rules, teacher, inputs):
    first = build_student(teacher, TINY["ssd-1b"])
    rule = StudentRule(down_pairs=(0,), up_pairs=(0, 2), mid="drop", depth={"UP1": [1, "2/3"]})
    second = build_student(first, rule)
    assert [stage.depths for stage in keep(first.config, rule) if stage.name == "UP1"] == [(1, 2)]
    with torch.no_grad():
        assert second(**inputs).sample.isfinite().all()


def test_the_teachers_dtype_is_kept(rules, teacher):
    assert {tensor.dtype for tensor in build_student(teacher.half(), rules["koala-1b"]).parameters()} == {torch.float16}


def test_depths_that_a_stock_unet_cannot_have_are_refused(teacher):
    rule = StudentRule(down_pairs=(0,), up_pairs=(0, 2), mid="keep", depth={"Mid": 1})
    with pytest.raises(KoalaError, match="DW3 starts with 3 transformer layers and Mid has 1"):
        build_student(teacher, rule)


@dataclass
class Folders:
    """The teacher's folder, and the stage, called as the runner calls it."""

    root: Path
    rules: dict[str, StudentRule]

    @property
    def out(self) -> Path:
        return self.root / "student"

    def build(self, name, run, init_from=None):
        self.out.mkdir(exist_ok=True)
        config = StudentConfig(unet=self.rules[name], init_from=init_from)
        student(config, teacher=self.root / "teacher", out=self.out, run=run)


@pytest.fixture
def folders(tmp_path, rules, teacher):
    """A teacher's pipeline folder in half precision, its files read-only, as DVC leaves them."""
    folder = tmp_path / "teacher"
    teacher.half().save_pretrained(folder / "unet")
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "image_encoder": [None, None],
        "../outside": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("vae", "unnamed", "../outside"):
        (folder / name).mkdir()
        (folder / name / "weights.bin").write_bytes(bytes(range(256)))
    for file in folder.rglob("*.*"):
        file.chmod(0o444)
    return Folders(tmp_path, rules)


def test_the_stage_writes_a_whole_pipeline_folder(folders, teacher, recorder):
    (folders.root / "teacher" / "LICENSE.md").write_text("use restrictions")
    folders.build("koala-1b", recorder)
    out = folders.out

    names = {"model_index.json", "LICENSE.md", "unet", "vae", "kept.json", "weight_map.json"}
    assert {path.name for path in out.iterdir()} == names
    for file in ("model_index.json", "LICENSE.md", "vae/weights.bin"):
        assert (out / file).read_bytes() == (folders.root / "teacher" / file).read_bytes()
        assert (out / file).stat().st_mode & 0o200

    built = UNet2DConditionModel.from_pretrained(out / "unet", torch_dtype=torch.float16, use_safetensors=True)
    source = teacher.state_dict()
    weights = json.loads((out / "weight_map.json").read_text())
    assert weights.keys() == built.state_dict().keys()
    for name, tensor in built.state_dict().items():
        assert torch.equal(tensor, source[weights[name]]), name

    kept = json.loads((out / "kept.json").read_text())
    assert kept["rule"]["up_pairs"] == [0, 2]
    assert kept["stages"][-1] == {
        "name": "UP3",
        "path": "up_blocks.2",
        "pairs": [0, 2],
        "depths": [0, 0],
        "teacher_depths": [0, 0],
    }
    assert str(folders.root) not in (out / "unet" / "config.json").read_text()
    assert read_stages(out) == keep(teacher.config, folders.rules["koala-1b"])
    assert recorder.logged["parameters"] == built.num_parameters()
    assert recorder.logged["share"] == built.num_parameters() / teacher.num_parameters()


def test_the_weights_are_stored_in_the_teachers_dtype(folders, recorder):
    folders.build("koala-700m", recorder)
    stored = load_file(folders.out / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


@pytest.mark.parametrize("fault", ["a tensor short", "another name", "cut off"])
def test_a_teacher_with_faulty_weights_is_refused(folders, fault, recorder):
    """diffusers would fill a missing tensor with random numbers and continue."""
    file = folders.root / "teacher" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    content = file.read_bytes()
    file.unlink()
    if fault == "a tensor short":
        save_file({name: tensor for name, tensor in tensors.items() if name != "conv_out.bias"}, file)
    elif fault == "another name":
        save_file(tensors, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    else:
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(KoalaError, match=r"lacks 1 tensors, such as conv_out\.bias|cannot be loaded") as refusal:
        folders.build("koala-700m", recorder)
    assert "\n" not in str(refusal.value)
    assert not list(folders.out.iterdir())


def test_an_interrupted_run_is_repaired_by_the_next(folders, monkeypatch, recorder):
    with monkeypatch.context() as patch:
        patch.setattr(
            UNet2DConditionModel, "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            folders.build("koala-700m", recorder)
    (folders.out / "half-written").touch()
    for _ in range(2):
        folders.build("koala-700m", recorder)
        assert (folders.out / "unet" / "config.json").is_file()
        assert not (folders.out / "half-written").exists()


@pytest.mark.parametrize(
    ("lacking", "complaint"), [("unet/*.safetensors", "holds no .safetensors"), ("*.json", "is no pipeline")]
)
def test_a_teacher_that_cannot_be_used_is_one_line(folders, lacking, complaint, recorder):
    for file in (folders.root / "teacher").glob(lacking):
        file.unlink()
    with pytest.raises(KoalaError, match=complaint) as refusal:
        folders.build("koala-700m", recorder)
    assert "\n" not in str(refusal.value)


@pytest.fixture
def release(folders, recorder, tmp_path):
    """A release of koala-700m, and its weights, which are none of the teacher's."""
    folders.build("koala-700m", recorder)
    folder = folders.out.rename(tmp_path / "release")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    return folder, tensors


def test_a_student_starts_from_an_earlier_release(folders, recorder, release, teacher):
    folder, tensors = release
    folders.build("koala-700m", recorder, init_from=str(folder))
    stored = load_file(folders.out / "unet" / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == tensors.keys()
    of_teacher = teacher.state_dict()
    for name, tensor in stored.items():
        assert torch.equal(tensor, tensors[name]), name
        assert name not in of_teacher or not torch.equal(tensor, of_teacher[name]), name
    assert json.loads((folders.out / "weight_map.json").read_text()) == {}
    assert read_stages(folders.out) == keep(teacher.config, folders.rules["koala-700m"])


def test_a_release_of_another_shape_is_one_line(folders, recorder, release):
    with pytest.raises(KoalaError, match="its U-Net has another shape than the rule gives: use its rule") as refusal:
        folders.build("koala-1b", recorder, init_from=str(release[0]))
    assert "\n" not in str(refusal.value)
    assert not list(folders.out.iterdir())


@pytest.mark.parametrize("fault", ["no weights", "a tensor short", "cut off"])
def test_a_release_that_cannot_be_used_is_named_and_not_the_teacher(folders, recorder, release, fault):
    folder, tensors = release
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.unlink()
    if fault == "a tensor short":
        save_file({name: tensor for name, tensor in tensors.items() if name != "conv_out.bias"}, file)
    elif fault == "cut off":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(KoalaError, match=f"student.init_from {folder} must be a release of koala") as refusal:
        folders.build("koala-700m", recorder, init_from=str(folder))
    assert "teacher" not in str(refusal.value).replace(str(folder), "")
    assert "\n" not in str(refusal.value)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def on_hub(release, as_hub, tmp_path, monkeypatch):
    """The release on a Hub on loopback, as us/koala-700m; gives the paths that it is asked for."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder, _ = release
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            asked.append(path)
            if path == f"/api/models/us/koala-700m/tree/{COMMIT}":
                files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
                listed = [
                    {
                        "type": "file",
                        "path": str(file.relative_to(folder)),
                        "size": file.stat().st_size,
                        "oid": "0" * 40,
                    }
                    for file in files
                ]
                return self.answer(200, json.dumps(listed).encode())
            file = folder / path.removeprefix(f"/us/koala-700m/resolve/{COMMIT}/")
            return self.answer(200, file.read_bytes()) if file.is_file() else self.answer(404)

        def do_HEAD(self):
            self.do_GET()

        def answer(self, code, content=b""):
            self.send_response(code)
            self.send_header("ETag", f'"{abs(hash(self.path))}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            if code == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    as_hub(Hub)
    return asked


def test_a_student_starts_from_a_release_on_the_hub(folders, recorder, release, on_hub):
    folders.build("koala-700m", recorder, init_from=f"us/koala-700m@{COMMIT}")
    stored = load_file(folders.out / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in release[1].items())
    fetched = {path.partition("/resolve/")[2] for path in on_hub if "/resolve/" in path}
    assert fetched == {f"{COMMIT}/unet/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors")}


def test_a_release_that_the_hub_does_not_have_is_one_line(folders, recorder, on_hub):
    with pytest.raises(KoalaError, match=r"cannot fetch student.init_from us/nobodys@0.*: check its name") as refusal:
        folders.build("koala-700m", recorder, init_from=f"us/nobodys@{COMMIT}")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("place", ["no/such/folder", "us/koala-700m", "us/koala-700m@main"])
def test_a_release_that_is_not_there_is_one_line(folders, recorder, place):
    with pytest.raises(KoalaError, match=r"there is no such folder, nor is it owner/name@COMMIT of the Hub"):
        folders.build("koala-700m", recorder, init_from=place)
