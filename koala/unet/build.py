"""The stage `student`: a student's U-Net from the teacher's, by a rule, in a complete pipeline folder.

    student = build_student(teacher.unet, rule)     # a stock UNet2DConditionModel, its weights the teacher's

The folder is the teacher's with another U-Net in it, and two files that say where that came from: kept.json (the rule
and the kept blocks) and weight_map.json (each tensor of the student, and the teacher's tensor it was copied from).
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError, safe_open

from koala.errors import KoalaError
from koala.unet.blocks import MID, Stage, StudentRule, keep
from koala.unet.weights import copy_weights, weight_map

if TYPE_CHECKING:
    from koala.config import Params
    from koala.tracking import StageRun

WEIGHT_MAP = "weight_map.json"
KEPT = "kept.json"


def student_config(teacher_config: Mapping[str, Any], stages: Sequence[Stage]) -> dict[str, Any]:
    """The UNet2DConditionModel configuration of the student that keeps `stages` of a teacher.

    For KOALA: layers_per_block=1, transformer_layers_per_block=[1, 2, 6] (1B) or [1, 2, 5] (700M), and in 700M a
    mid_block_type of None; all else is the teacher's. Raises KoalaError for depths that a stock U-Net cannot have.
    """
    down = [stage for stage in stages if stage.path.startswith("down_blocks")]
    up = [stage for stage in stages if stage.path.startswith("up_blocks")]
    mid = next((stage for stage in stages if stage.path == MID), None)
    layers = [len(stage.pairs) for stage in down]
    return {
        **{name: value for name, value in teacher_config.items() if not name.startswith("_")},
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "mid_block_type": mid and ("UNetMidBlock2DCrossAttn" if mid.depths[0] else "UNetMidBlock2D"),
        **_transformer_layers(down, mid, up),
    }


def _transformer_layers(down: Sequence[Stage], mid: Stage | None, up: Sequence[Stage]) -> dict[str, Any]:
    """The depths in diffusers' shorthand: a number a level, and the way up named by itself only where it differs."""
    descent, ascent = [_depth(stage) for stage in down], [_depth(stage) for stage in up]
    if mid and mid.depths[0]:
        # A stock U-Net has no depth of its own for the mid block: it takes that of the last level's first pair.
        if descent[-1] is not None and down[-1].depths[0] != mid.depths[0]:
            raise KoalaError(
                f"{down[-1].name} starts with {down[-1].depths[0]} transformer layers and Mid has {mid.depths[0]}: "
                "diffusers' U-Net needs the same in both, change one in the rule's depth"
            )
        descent[-1] = descent[-1] or mid.depths[0]
    levels = list(zip(descent, reversed(ascent), strict=True))
    mirrored = all(isinstance(depth, int | None) for level in levels for depth in level) and all(
        None in level or level[0] == level[1] for level in levels
    )
    if mirrored:
        return {
            "transformer_layers_per_block": [below or above or 1 for below, above in levels],
            "reverse_transformer_layers_per_block": None,
        }
    return {
        "transformer_layers_per_block": [depth or 1 for depth in descent],
        "reverse_transformer_layers_per_block": [depth or 1 for depth in ascent],
    }


def _depth(stage: Stage) -> int | list[int] | None:
    """One figure where a stage's pairs are equally deep, a list where they are not, None where it does not attend."""
    if not any(stage.depths):
        return None
    return stage.depths[0] if len(set(stage.depths)) == 1 else list(stage.depths)


def empty_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A stock U-Net of this configuration on meta tensors: shapes without memory."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config))


def build_student(teacher: UNet2DConditionModel, rule: StudentRule) -> UNet2DConditionModel:
    """The student that `rule` makes of `teacher`: its tensors are copies, in the teacher's dtype and on its device.

    Raises KoalaError where the rule asks for what the teacher lacks, or for blocks that do not fit each other.
    """
    stages = keep(teacher.config, rule)
    student = empty_unet(student_config(teacher.config, stages))
    copy_weights(student, teacher, weight_map(stages, student.state_dict()))
    return student.eval()


def run(params: "Params", run: "StageRun", student: str) -> None:
    """Write the folder of `student`, whole or not at all. Raises KoalaError where the teacher's cannot be used."""
    from koala.console import say
    from koala.tracking import hash_tags

    teacher_folder, out = params.need("teacher"), params.out("student", student)
    rule = params.student(student)
    teacher = _load_unet(teacher_folder / "unet")
    built = build_student(teacher, rule)
    stages = keep(teacher.config, rule)

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _copy_components(teacher_folder, partial)
    built.save_pretrained(partial / "unet", safe_serialization=True)
    _write_json(partial / WEIGHT_MAP, weight_map(stages, built.state_dict()))
    _write_json(partial / KEPT, {"rule": rule.model_dump(), "stages": [asdict(stage) for stage in stages]})
    if out.exists():
        shutil.rmtree(out)
    os.replace(partial, out)

    parameters, of_teacher = built.num_parameters(), teacher.num_parameters()
    share = parameters / of_teacher
    run.metrics({"parameters": parameters, "teacher_parameters": of_teacher, "share": share})
    run.tags(hash_tags(teacher=teacher_folder))
    run.artifact(out / KEPT)
    say(f"{student}: {parameters:,} of the teacher's {of_teacher:,} parameters ({share:.1%}) in {out}")


def _load_unet(folder: Path) -> UNet2DConditionModel:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise KoalaError(f"{folder} holds no .safetensors: make the teacher again (`koala teacher`)")
    try:
        # diffusers turns half-precision weights into float32 unless told their dtype.
        with safe_open(weights[0], "pt") as tensors:
            dtype = tensors.get_tensor(next(iter(tensors.keys()))).dtype
        unet, found = UNet2DConditionModel.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise KoalaError(f"{folder} cannot be loaded: make the teacher again (`koala teacher`): {reason}") from None
    if found["missing_keys"]:
        # diffusers would go on with random numbers in their place.
        raise KoalaError(f"{folder} lacks {len(found['missing_keys'])} tensors, such as {min(found['missing_keys'])}")
    return unet


def _copy_components(teacher: Path, to: Path) -> None:
    """Copy what model_index.json names, but the U-Net, byte for byte; writable, though DVC's files are read-only."""
    try:
        index = json.loads((teacher / "model_index.json").read_text())
    except (OSError, ValueError) as error:
        raise KoalaError(
            f"{teacher} is no pipeline folder (model_index.json: {error}): make the teacher again"
        ) from None
    to.mkdir(parents=True)
    shutil.copyfile(teacher / "model_index.json", to / "model_index.json")
    for component in index:
        if component.isidentifier() and component != "unet" and (teacher / component).is_dir():
            shutil.copytree(teacher / component, to / component, copy_function=shutil.copyfile)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
