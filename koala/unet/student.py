"""The stage `student`: a student's U-Net from the teacher's, by a rule, in a complete pipeline folder.

    student = build_student(teacher.unet, rule)     # a stock UNet2DConditionModel, its weights the teacher's

The folder is the teacher's with another U-Net in it, and two files that say where that came from: kept.json (the rule
and the kept blocks) and weight_map.json (each tensor of the student, and the tensor of the teacher it was copied from).
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError, safe_open

from koala.console import say
from koala.errors import DISK_FULL, KoalaError, line_of
from koala.run import Run
from koala.teacher.layout import LICENSE
from koala.unet.blocks import MID, Stage, StudentRule, keep
from koala.unet.config import StudentConfig
from koala.unet.weights import copy_weights, weight_map

WEIGHT_MAP = "weight_map.json"
KEPT = "kept.json"


def student_config(teacher_config: Mapping[str, Any], stages: Sequence[Stage]) -> dict[str, Any]:
    """Return the UNet2DConditionModel configuration of the student that keeps `stages` of a teacher.

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
    """Return the depths in diffusers' shorthand: a number a level, the decoder's named only where they differ."""
    descent, ascent = [_depth(stage) for stage in down], [_depth(stage) for stage in up]
    if mid and mid.depths[0]:
        # A stock U-Net has no separate depth for the mid block: it takes that of the last level's first pair.
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
    """Return one figure where a stage's pairs are equally deep, a list where not, None where it has no transformer."""
    if not any(stage.depths):
        return None
    return stage.depths[0] if len(set(stage.depths)) == 1 else list(stage.depths)


def empty_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """Return a stock U-Net of this configuration on meta tensors: shapes without memory."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config))


def build_student(teacher: UNet2DConditionModel, rule: StudentRule) -> UNet2DConditionModel:
    """Return the student that `rule` makes of `teacher`: its tensors are copies, in the teacher's dtype and on its device.

    Raises KoalaError where the rule asks for what the teacher lacks, or for blocks that do not fit each other.
    """
    stages = keep(teacher.config, rule)
    student = empty_unet(student_config(teacher.config, stages))
    copy_weights(student, teacher, weight_map(stages, student.state_dict()))
    return student.eval()


def student(config: StudentConfig, teacher: Path, out: Path, run: Run) -> None:
    """Write the student's pipeline folder to `out`: the teacher's, with the U-Net that the rule makes of the teacher's.

    Raises KoalaError where the teacher or the release to start from cannot be used, or the rule does not fit the teacher.
    """
    unet = _load_unet(teacher / "unet")
    built = build_student(unet, config.unet)
    stages = keep(unet.config, config.unet)
    if config.init_from:
        _start_from(built, config.init_from)
    shutil.rmtree(out)
    _copy_components(teacher, out)
    built.save_pretrained(out / "unet", safe_serialization=True)
    _write_json(out / WEIGHT_MAP, {} if config.init_from else weight_map(stages, built.state_dict()))
    _write_json(out / KEPT, {"rule": config.unet.model_dump(), "stages": [asdict(stage) for stage in stages]})

    parameters, of_teacher = built.num_parameters(), unet.num_parameters()
    share = parameters / of_teacher
    run.metrics({"parameters": parameters, "teacher_parameters": of_teacher, "share": share})
    run.artifact(out / KEPT)
    say(f"student: {parameters:,} of the teacher's {of_teacher:,} parameters ({share:.1%})")


def read_stages(student: Path) -> tuple[Stage, ...]:
    """Return the teacher's blocks that a student's folder says it keeps. Raises KoalaError where it does not say."""
    try:
        stages = json.loads((student / KEPT).read_text())["stages"]
    except (OSError, ValueError, LookupError):
        raise KoalaError(f"{student} has no {KEPT}: build the student again (`koala student`)") from None
    shapes = ("pairs", "depths", "teacher_depths")
    return tuple(Stage(stage["name"], stage["path"], *(tuple(stage[each]) for each in shapes)) for stage in stages)


def _start_from(built: UNet2DConditionModel, release: str) -> None:
    """Give the student the weights of an earlier release, in place of the teacher's."""
    remedy = f"student.init_from {release} must be a release of koala, with its U-Net in safetensors"
    weights = _load_unet(_release_unet(release), remedy).state_dict()
    wanted = {name: tensor.shape for name, tensor in built.state_dict().items()}
    if wanted != {name: tensor.shape for name, tensor in weights.items()}:
        raise KoalaError(f"student.init_from {release}: its U-Net has another shape than the rule gives: use its rule")
    built.load_state_dict(weights)


def _release_unet(release: str) -> Path:
    """Return the U-Net's folder of a release on disk, or fetch it from the Hub."""
    if Path(release).is_dir():
        return Path(release, "unet")
    repository, _, revision = release.partition("@")
    if repository.count("/") != 1 or len(revision) != 40:
        raise KoalaError(
            f"student.init_from {release}: there is no such folder, nor is it owner/name@COMMIT of the Hub"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["unet/config.json", "unet/*.safetensors", "unet/*.safetensors.index.json"]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted), "unet")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        raise KoalaError(
            f"cannot fetch student.init_from {release} ({type(error).__name__}): check its name and the network"
        ) from None


def _load_unet(folder: Path, remedy: str = "make the teacher again (`koala teacher`)") -> UNet2DConditionModel:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise KoalaError(f"{folder} holds no .safetensors: {remedy}")
    try:
        # diffusers turns half-precision weights into float32 unless told their dtype.
        with safe_open(weights[0], "pt") as tensors:
            dtype = tensors.get_tensor(next(iter(tensors.keys()))).dtype
        unet, found = UNet2DConditionModel.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise KoalaError(f"{folder} cannot be loaded: {remedy}: {line_of(error)}") from None
    if found["missing_keys"]:
        # diffusers would continue with random numbers in their place.
        lacking = f"{len(found['missing_keys'])} tensors, such as {min(found['missing_keys'])}"
        raise KoalaError(f"{folder} lacks {lacking}: {remedy}")
    return unet


def _copy_components(teacher: Path, to: Path) -> None:
    """Copy what model_index.json names except the U-Net, and the licence, byte for byte.

    The copies are writable, though DVC's files are read-only.
    """
    try:
        index = json.loads((teacher / "model_index.json").read_text())
    except (OSError, ValueError) as error:
        raise KoalaError(
            f"{teacher} is no pipeline folder (model_index.json: {error}): make the teacher again"
        ) from None
    to.mkdir(parents=True)
    shutil.copyfile(teacher / "model_index.json", to / "model_index.json")
    if (teacher / LICENSE).is_file():
        shutil.copyfile(teacher / LICENSE, to / LICENSE)
    for component in index:
        if component.isidentifier() and component != "unet" and (teacher / component).is_dir():
            shutil.copytree(teacher / component, to / component, copy_function=shutil.copyfile)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
