"""LoRAs of a teacher on its student: every module lands where its teacher's origin is, in each style of names."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from publish.small import ROWS, SMALL, STUDENTS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from koala import generate
from koala.convert import convert_lora
from koala.errors import KoalaError
from koala.evaluate.config import SamplingConfig
from koala.publish.lora import kept, renaming
from koala.sheet import open_model
from koala.teacher.config import LoraPart
from koala.teacher.original import places
from koala.unet.blocks import keep
from koala.unet.reference import SDXL
from koala.unet.student import KEPT, empty_unet, student_config
from koala.unet.weights import weight_map


def modules(config: dict[str, Any]) -> list[str]:
    """The modules of a U-Net that a LoRA may change."""
    return _modules(json.dumps(config))


@cache
def _modules(config: str) -> list[str]:
    unet = empty_unet(json.loads(config))
    return [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def of_student(name: str) -> tuple[dict[str, Any], Any]:
    stages = keep(SDXL, STUDENTS[name])
    return student_config(SDXL, stages), stages


def kohya(module: str, config: Any) -> str:
    """The name in the original layout by the map of tensors, which diffusers' converters check in test_single_file."""
    place = places("unet", config)(f"{module}.weight")
    assert place is not None
    return place.name.removeprefix("model.diffusion_model.").removesuffix(".weight")


STYLES: dict[str, Callable[[str, Any], str]] = {
    "diffusers": lambda module, config: f"unet.{module}.lora.down.weight",
    "peft": lambda module, config: f"base_model.model.{module}.lora_A.weight",
    "kohya": lambda module, config: f"lora_unet_{kohya(module, config).replace('.', '_')}.lora_down.weight",
    "kohya of diffusers": lambda module, config: f"lora_unet_{module.replace('.', '_')}.alpha",
    "original": lambda module, config: f"diffusion_model.{kohya(module, config)}.lora_A.weight",
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("student", [*ROWS, "bk-base", "resnets-in-mid", "ssd-1b", "sdxl"])
def test_each_module_lands_where_its_origin_is_and_nowhere_else(student: str, style: str) -> None:
    spell = STYLES[style]
    config, stages = of_student(student)
    rename = renaming(SDXL, config, stages)
    origins = weight_map(stages, [f"{module}.weight" for module in modules(config)])
    expected = {
        spell(origin.removesuffix(".weight"), SDXL): spell(name.removesuffix(".weight"), config)
        for name, origin in origins.items()
    }
    of_teacher = [spell(module, SDXL) for module in modules(dict(SDXL))]
    assert len(set(of_teacher)) == len(of_teacher)
    assert {name: rename(name) for name in of_teacher} == {name: expected.get(name) for name in of_teacher}
    assert len(set(expected.values())) == len(expected)


@pytest.mark.parametrize(("student", "wrong"), [("koala-700m", 74), ("koala-1b", 84)])
def test_unconverted_names_land_on_other_modules_of_the_same_shape(student: str, wrong: int) -> None:
    """What the conversion is for: as many of a LoRA's 722 modules would, without an error."""
    config, stages = of_student(student)
    of_teacher = [name for name in modules(dict(SDXL)) if ".attentions." in name]
    names = [name for name in modules(config) if ".attentions." in name]
    origins = weight_map(stages, [f"{name}.weight" for name in names])
    moved = [name for name in names if origins[f"{name}.weight"] != f"{name}.weight"]
    assert (len(of_teacher), len(moved)) == (722, wrong)
    rename = renaming(SDXL, config, stages)
    assert all(rename(f"unet.{name}.lora_A.weight") is None for name in moved)  # the teacher's pair 1, which is dropped


def test_names_by_hand() -> None:
    rename = renaming(SDXL, *of_student("koala-700m"))
    tail = "transformer_blocks_{}_attn1_to_q.lora_up.weight"
    assert rename("lora_unet_input_blocks_7_1_" + tail.format(4)) == "lora_unet_input_blocks_5_1_" + tail.format(4)
    assert rename("lora_unet_input_blocks_7_1_" + tail.format(5)) is None  # five layers are kept
    assert rename("lora_unet_input_blocks_8_1_" + tail.format(0)) is None
    assert rename("lora_unet_middle_block_1_" + tail.format(0)) is None
    assert rename("lora_unet_output_blocks_2_1_" + tail.format(0)) == "lora_unet_output_blocks_1_1_" + tail.format(0)
    assert (
        rename("lora_unet_up_blocks_0_attentions_2_proj_in.alpha") == "lora_unet_up_blocks_0_attentions_1_proj_in.alpha"
    )
    assert rename("lora_unet_input_blocks_3_0_op.lora_down.weight") == "lora_unet_input_blocks_2_0_op.lora_down.weight"
    old = "unet.up_blocks.1.attentions.{}.transformer_blocks.0.attn2.processor.to_out_lora.up.weight"
    assert rename(old.format(2)) == old.format(1)
    for text in ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "text_encoder_2.x.lora_A.weight"):
        assert rename(text) == text
    for unknown in (
        "unet.up_blocks.0.attentions.20.proj_in.lora_A.weight",
        "lora_unet_nothing.alpha",
        "unet.down_blocks.3.resnets.0.conv1.lora_A.weight",
        "transformer.x",
    ):
        with pytest.raises(KeyError):
            rename(unknown)


@pytest.mark.parametrize("student", [*ROWS, "bk-base", "resnets-in-mid", "sdxl"])
def test_a_folder_without_kept_json_gives_the_pairs_that_its_rule_kept(
    student: str, student_folder: Callable[[str], Path]
) -> None:
    folder = student_folder(student)
    assert not (folder / KEPT).exists()
    teacher = {**SDXL, **SMALL}
    assert kept(folder, teacher) == keep(teacher, STUDENTS[student]) or student == "resnets-in-mid"
    assert {stage.path: stage.pairs for stage in kept(folder, teacher)} == {
        stage.path: stage.pairs for stage in keep(teacher, STUDENTS[student])
    }


def test_a_folder_that_leaves_a_choice_is_refused(student_folder: Callable[[str], Path], tmp_path: Path) -> None:
    deeper = {**SDXL, "layers_per_block": 3}
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text(json.dumps({**SDXL}))
    with pytest.raises(KoalaError, match="does not say which of the teacher's pairs its DW1 keeps"):
        kept(tmp_path, deeper)


def lora_of(config: dict[str, Any], style: str, rank: int = 2) -> dict[str, Tensor]:
    """A LoRA for every linear layer of the transformers of a small teacher, strong enough to be seen."""
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, module in empty_unet(config).named_modules():
        if isinstance(module, nn.Linear) and "transformer_blocks" in name:
            down = torch.randn(rank, module.in_features, generator=random)
            up = torch.randn(module.out_features, rank, generator=random) * 0.1
            if style == "kohya":
                stem = f"lora_unet_{kohya(name, config).replace('.', '_')}"
                tensors |= {
                    f"{stem}.lora_down.weight": down,
                    f"{stem}.lora_up.weight": up,
                    f"{stem}.alpha": torch.tensor(2.0),
                }
            else:
                tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    return tensors


def deltas(unet: Any) -> dict[str, Tensor]:
    """What a loaded LoRA adds to each weight."""
    return {
        name: (module.lora_B["default_0"].weight @ module.lora_A["default_0"].weight).detach()
        for name, module in unet.named_modules()
        if hasattr(module, "lora_A") and "default_0" in module.lora_A
    }


@pytest.mark.parametrize("style", ["peft", "kohya"])
@pytest.mark.parametrize("student", [*ROWS])
def test_a_converted_lora_loads_and_changes_what_its_origins_change(
    student: str,
    style: str,
    student_folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, teacher = student_folder(student), {**SDXL, **SMALL}
    lora, out = tmp_path / "lora.safetensors", tmp_path / "new" / "student.safetensors"
    tensors = lora_of(teacher, style)
    save_file(tensors, lora, {"ss_base_model_version": "sdxl_base_v1-0"})
    convert_lora(lora, str(folder), out)
    with safe_open(out, "pt") as opened:
        assert opened.metadata() == {"ss_base_model_version": "sdxl_base_v1-0"}
    dropped = capsys.readouterr().out.split()
    each = 3 if style == "kohya" else 2
    assert len(load_file(out)) == len(tensors) - each * len(dropped) > 0
    assert len(set(dropped)) == len(dropped) > 0
    assert all(any(name.startswith(f"{module}.") for name in tensors) for module in dropped)

    pipeline = generate.load(folder, "float32")
    sampling, prompts = SamplingConfig(steps=2, guidance=2.0), [("a large red circle", 1)]
    before = np.asarray(generate.generate(pipeline, prompts, sampling)[0])
    pipeline.load_lora_weights(str(out.parent), weight_name=out.name, local_files_only=True)
    after = np.asarray(generate.generate(pipeline, prompts, sampling)[0])
    assert not np.array_equal(before, after)

    full = StableDiffusionXLPipeline.from_pretrained(
        student_folder("sdxl"), use_safetensors=True, local_files_only=True
    )
    full.load_lora_weights(str(tmp_path), weight_name=lora.name, local_files_only=True)
    found, of_teacher = deltas(pipeline.unet), deltas(full.unet)
    origins = weight_map(keep(teacher, STUDENTS[student]), [f"{name}.x" for name in found])
    assert len(found) * each == len(load_file(out))
    for name, delta in found.items():
        assert torch.equal(delta, of_teacher[origins[f"{name}.x"].removesuffix(".x")]), name


@pytest.mark.parametrize("with_kept", [False, True])
def test_generating_takes_a_lora_for_sdxl_and_one_for_the_student_alike(
    with_kept: bool, student_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = student_folder("koala-700m"), tmp_path / "student.safetensors"
    lora = tmp_path / "lora.safetensors"
    save_file(lora_of({**SDXL, **SMALL}, "kohya"), lora)
    convert_lora(lora, str(folder), out)
    lacking = len(capsys.readouterr().out.split())
    if with_kept:
        folder = Path(shutil.copytree(folder, tmp_path / "folder"))
        stages = [asdict(stage) for stage in keep({**SDXL, **SMALL}, STUDENTS["koala-700m"])]
        (folder / KEPT).write_text(json.dumps({"stages": stages}))

    def weights(*loras: LoraPart) -> dict[str, Tensor]:
        found: dict[str, Tensor] = open_model(str(folder), loras, dtype="float32").unet.state_dict()
        return found

    plain, renamed = weights(), weights(LoraPart(file=lora, weight=0.5))
    said = capsys.readouterr().err
    assert f"{folder} lacks {lacking} of its modules, which are left out" in said
    fitting = weights(LoraPart(file=out, weight=0.5))
    assert "lacks" not in capsys.readouterr().err
    assert all(torch.equal(renamed[name], fitting[name]) for name in plain)
    changed = {name for name in plain if not torch.equal(plain[name], renamed[name])}
    assert len(changed) == len(load_file(out)) // 3
    stronger = weights(LoraPart(file=out))
    name = min(changed)
    assert torch.allclose(stronger[name] - plain[name], 2 * (renamed[name] - plain[name]), atol=1e-5)


def test_diffusers_own_description_is_renamed_too(student_folder: Callable[[str], Path], tmp_path: Path) -> None:
    third, second = (f"up_blocks.0.attentions.{pair}.transformer_blocks.0.attn1.to_q" for pair in (2, 1))
    described = {
        "unet.r": 2,
        "unet.target_modules": ["to_k", third, second],
        "unet.alpha_pattern": {third: 4, second: 8},
        "text_encoder.target_modules": ["q_proj"],
    }
    tensors = {f"unet.{third}.lora_A.weight": torch.zeros(2, 128), f"unet.{third}.lora_B.weight": torch.zeros(128, 2)}
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(described)})
    convert_lora(tmp_path / "lora.safetensors", str(student_folder("koala-700m")), tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        assert json.loads(opened.metadata()["lora_adapter_metadata"]) == {
            **described,
            "unet.target_modules": ["to_k", second],
            "unet.alpha_pattern": {second: 4},
        }


def test_what_cannot_be_converted_is_one_line(tmp_path: Path, student_folder: Callable[[str], Path]) -> None:
    folder, out = str(student_folder("koala-700m")), tmp_path / "out.safetensors"
    lora = tmp_path / "lora.safetensors"

    def refused(line: str, to: str = folder, out: Path = out) -> None:
        with pytest.raises(KoalaError, match=line) as caught:
            convert_lora(lora, to, out)
        assert "\n" not in str(caught.value)

    refused("there is no LoRA at")
    lora.write_bytes(b"no tensors")
    refused("is not a safetensors file")
    refused("is the LoRA itself", out=lora)
    save_file({"transformer.blocks.0.lora_A.weight": torch.zeros(1)}, lora)
    refused("which is no module of SDXL under diffusers', peft's or kohya's names: choose a LoRA for SDXL")
    save_file({"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.zeros(1)}, lora)
    refused("the student has none of the 1 modules")
    refused("'nobody' is neither a model folder nor a student", to="nobody")
    assert not out.exists()


def test_the_student_may_be_named(tmp_path: Path, workspace: Path) -> None:
    lora, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    save_file({"unet.up_blocks.1.attentions.2.proj_in.lora_A.weight": torch.zeros(1)}, lora)
    convert_lora(lora, "koala-1b", out)
    assert set(load_file(out)) == {"unet.up_blocks.1.attentions.1.proj_in.lora_A.weight"}
