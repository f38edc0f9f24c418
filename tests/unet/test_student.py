"""Students are stock U-Nets that run, in whole pipeline folders."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from koala.errors import KoalaError
from koala.unet.blocks import StudentRule, keep, teacher_stages
from koala.unet.build import build_student, run, student_config
from koala.unet.reference import SDXL

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
    """What the stage asks of the parameters."""

    root: Path
    rules: dict[str, StudentRule]

    def need(self, stage: str) -> Path:
        return self.root / stage

    def out(self, stage: str, student: str) -> Path:
        return self.root / stage / student

    def student(self, name: str) -> StudentRule:
        return self.rules[name]


@dataclass
class Recorded:
    """What the stage told MLflow."""

    told: dict[str, object] = field(default_factory=dict)

    def metrics(self, values):
        self.told |= values

    def tags(self, values):
        self.told |= values

    def artifact(self, path):
        assert path.is_file()


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


def test_the_stage_writes_a_whole_pipeline_folder(folders, teacher):
    recorded = Recorded()
    run(folders, recorded, "koala-1b")
    out = folders.out("student", "koala-1b")

    names = {"model_index.json", "unet", "vae", "kept.json", "weight_map.json"}
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in out.parent.iterdir()] == ["koala-1b"]
    for file in ("model_index.json", "vae/weights.bin"):
        assert (out / file).read_bytes() == (folders.root / "teacher" / file).read_bytes()
        assert (out / file).stat().st_mode & 0o200

    student = UNet2DConditionModel.from_pretrained(out / "unet", torch_dtype=torch.float16, use_safetensors=True)
    source = teacher.state_dict()
    weights = json.loads((out / "weight_map.json").read_text())
    assert weights.keys() == student.state_dict().keys()
    for name, tensor in student.state_dict().items():
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
    assert recorded.told["parameters"] == student.num_parameters()
    assert recorded.told["share"] == student.num_parameters() / teacher.num_parameters()
    assert "data_hash.teacher" in recorded.told


def test_the_weights_are_stored_in_the_teachers_dtype(folders):
    run(folders, Recorded(), "koala-700m")
    stored = load_file(folders.out("student", "koala-700m") / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


@pytest.mark.parametrize("fault", ["a tensor short", "another name", "cut off"])
def test_a_teacher_with_faulty_weights_is_refused(folders, fault):
    """diffusers would fill a missing tensor with random numbers and go on."""
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
        run(folders, Recorded(), "koala-700m")
    assert "\n" not in str(refusal.value)
    assert not folders.out("student", "koala-700m").exists()


def test_a_run_that_was_cut_is_made_good_by_the_next(folders, monkeypatch):
    out = folders.out("student", "koala-700m")
    with monkeypatch.context() as patch:
        patch.setattr(
            UNet2DConditionModel, "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            run(folders, Recorded(), "koala-700m")
    assert not out.exists()
    for _ in range(2):
        run(folders, Recorded(), "koala-700m")
        assert (out / "unet" / "config.json").is_file()
    assert [path.name for path in out.parent.iterdir()] == ["koala-700m"]


@pytest.mark.parametrize(
    ("lacking", "complaint"), [("unet/*.safetensors", "holds no .safetensors"), ("*.json", "is no pipeline")]
)
def test_a_teacher_that_cannot_be_used_is_one_line(folders, lacking, complaint):
    for file in (folders.root / "teacher").glob(lacking):
        file.unlink()
    with pytest.raises(KoalaError, match=complaint) as refusal:
        run(folders, Recorded(), "koala-700m")
    assert "\n" not in str(refusal.value)
