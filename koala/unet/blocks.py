"""The teacher's blocks that a student keeps: the rule (in params.yaml), and the kept blocks as data.

    rule = StudentRule(down_pairs=(0,), up_pairs=(0, 2), mid="drop", depth={"DW3": "5/10", "UP1": "5/10"})
    for stage in keep(teacher_unet.config, rule):
        stage.name, stage.path, stage.pairs, stage.depths        # "UP1", "up_blocks.0", (0, 2), (5, 5)

Names: a U-Net of n levels has the stages DW1 .. DWn, Mid, UP1 .. UPn, in the order of its forward pass. A stage is a
row of pairs, each a residual block and, in stages that attend, a transformer of so many layers (its depth) behind it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from koala.config import Config
from koala.errors import KoalaError

Depth = int | str
"""A count of transformer layers, or a share of the teacher's: "5/10"."""

MID = "mid_block"
_STAGE_NAME = re.compile(r"DW[1-9]\d*|Mid|UP[1-9]\d*")
_SHARE = re.compile(r"(\d+)/(\d+)")
# The block types of diffusers that make up a U-Net of SDXL's kind, and whether they hold transformers.
_ATTENDS = {
    "DownBlock2D": False,
    "CrossAttnDownBlock2D": True,
    "UNetMidBlock2D": False,
    "UNetMidBlock2DCrossAttn": True,
    "UpBlock2D": False,
    "CrossAttnUpBlock2D": True,
}


class StudentRule(Config):
    """A rule that says which of the teacher's blocks a student keeps; it applies to any SDXL-shaped teacher.

    Within a transformer the first layers are kept (student layer l takes teacher layer l).
    """

    down_pairs: tuple[int, ...]
    """Pairs kept in every down stage, counted from 0."""
    up_pairs: tuple[int, ...]
    """Pairs kept in every up stage, one more than in a down stage."""
    mid: Literal["keep", "resnets", "drop"]
    """resnets: keep only the mid block's first residual block."""
    depth: dict[str, Depth | tuple[Depth, ...]] = Field(default_factory=dict)
    """Transformer layers of a stage, one figure or one for each kept pair: a count, or a share of the teacher's ("5/10").
    Other stages keep theirs."""

    @field_validator("down_pairs", "up_pairs")
    @classmethod
    def _ordered(cls, pairs: tuple[int, ...]) -> tuple[int, ...]:
        if not pairs:
            raise ValueError("must keep one pair at least")
        if pairs[0] < 0:
            raise ValueError(f"pairs are counted from 0: {list(pairs)}")
        for before, after in pairwise(pairs):
            if before == after:
                raise ValueError(f"pair {after} is named twice: {list(pairs)}")
            if before > after:
                raise ValueError(f"pair {after} is out of order: {list(pairs)}")
        return pairs

    @field_validator("depth", mode="before")
    @classmethod
    def _depths(cls, depth: Any) -> Any:
        if not isinstance(depth, Mapping):
            raise ValueError("must map stages to depths, as {DW3: 5/10, Mid: 6}")
        for stage, wanted in depth.items():
            if not isinstance(stage, str) or not _STAGE_NAME.fullmatch(stage):
                raise ValueError(f"no stage is called {stage!r}: they are DW1, DW2, ..., Mid, UP1, UP2, ...")
            for each in wanted if isinstance(wanted, list | tuple) else (wanted,):
                _check_depth(stage, each)
        return depth

    @model_validator(mode="after")
    def _fits_a_unet(self) -> Self:
        # A stage of the U-Net's decoder has one pair more than that of its encoder: it also takes that stage's input.
        if len(self.up_pairs) != len(self.down_pairs) + 1:
            raise ValueError(
                f"up_pairs must be one more than down_pairs ({len(self.down_pairs)} + 1), not {len(self.up_pairs)}"
            )
        if self.mid != "keep" and "Mid" in self.depth:
            raise ValueError(f"mid '{self.mid}' leaves no transformer in Mid: take Mid out of depth")
        kept = {"DW": len(self.down_pairs), "Mi": 1, "UP": len(self.up_pairs)}
        for stage, wanted in self.depth.items():
            if isinstance(wanted, tuple) and len(wanted) != kept[stage[:2]]:
                raise ValueError(f"depth of {stage} must be one figure, or {kept[stage[:2]]}: one for each kept pair")
        return self


def _check_depth(stage: str, depth: Any) -> None:
    if isinstance(depth, str):
        share = _SHARE.fullmatch(depth)
        if share and 0 < int(share[1]) <= int(share[2]):
            return
        raise ValueError(
            f"depth of {stage}: {depth!r} is no share of the teacher's depth above 0 and up to 1, such as 5/10"
        )
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        raise ValueError(f"depth of {stage}: {depth!r} is neither a count of layers from 1 nor a share such as 5/10")


@dataclass(frozen=True)
class Stage:
    """One of the teacher's stages, as a student keeps it. The mid block counts as one pair."""

    name: str
    """DW1, Mid, UP1, ..."""
    path: str
    """The stage's module in both U-Nets."""
    pairs: tuple[int, ...]
    """The teacher's pair for each of the student's."""
    depths: tuple[int, ...]
    """The student's transformer layers in each of its pairs, 0 where a pair has no transformer."""
    teacher_depths: tuple[int, ...]
    """The teacher's, in the same pairs."""


def teacher_stages(teacher_config: Mapping[str, Any]) -> tuple[Stage, ...]:
    """Return a U-Net's own stages, all of them kept, from its UNet2DConditionModel configuration.

    Raises KoalaError where the U-Net is not of SDXL's shape (only plain and cross-attention blocks).
    """
    down_types, up_types = teacher_config["down_block_types"], teacher_config["up_block_types"]
    mid_type = teacher_config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    for block in (*down_types, *up_types, *((mid_type,) if mid_type else ())):
        if block not in _ATTENDS:
            raise KoalaError(f"the U-Net has a block of type {block}: koala knows only {', '.join(_ATTENDS)}")
    levels = len(down_types)
    layers = _for_each(teacher_config.get("layers_per_block", 2), levels)
    down_depths = _for_each(teacher_config.get("transformer_layers_per_block", 1), levels)
    up_depths = teacher_config.get("reverse_transformer_layers_per_block") or down_depths[::-1]
    return (
        *(
            _whole(f"DW{level + 1}", f"down_blocks.{level}", down_types[level], layers[level], down_depths[level])
            for level in range(levels)
        ),
        *((_whole("Mid", MID, mid_type, 1, down_depths[-1]),) if mid_type else ()),
        *(
            _whole(f"UP{level + 1}", f"up_blocks.{level}", up_types[level], layers[-1 - level] + 1, up_depths[level])
            for level in range(levels)
        ),
    )


def _whole(name: str, path: str, block: str, pairs: int, depth: int | Sequence[int]) -> Stage:
    depths = tuple(_for_each(depth, pairs)[:pairs]) if _ATTENDS[block] else (0,) * pairs
    if len(depths) < pairs:
        raise KoalaError(f"the U-Net's configuration gives {len(depths)} transformer depths to {name}'s {pairs} pairs")
    return Stage(name, path, tuple(range(pairs)), depths, depths)


def _for_each(value: Any, count: int) -> list[Any]:
    """Expand diffusers' shorthand: one number stands for `count` of them."""
    return [value] * count if isinstance(value, int) else list(value)


def keep(teacher_config: Mapping[str, Any], rule: StudentRule) -> tuple[Stage, ...]:
    """Return the stages of the student that `rule` makes of a teacher, from the teacher's UNet2DConditionModel configuration.

    Raises KoalaError where the rule asks for a stage, a pair or a depth that the teacher does not have.
    """
    teacher = {stage.name: stage for stage in teacher_stages(teacher_config)}
    if "Mid" not in teacher and rule.mid != "drop":
        raise KoalaError(f"the teacher has no mid block to {rule.mid}: set 'mid: drop'")
    attending = [name for name, stage in teacher.items() if any(stage.depths)]
    for name in rule.depth:
        if name not in attending:
            raise KoalaError(
                f"depth names {name}, where the teacher has no transformer: choose from {', '.join(attending)}"
            )
    return tuple(_keep(stage, rule) for stage in teacher.values() if stage.path != MID or rule.mid != "drop")


def _keep(teacher: Stage, rule: StudentRule) -> Stage:
    if teacher.path == MID:
        pairs: tuple[int, ...] = (0,)
    else:
        pairs = rule.down_pairs if teacher.path.startswith("down") else rule.up_pairs
    if pairs[-1] not in teacher.pairs:
        have = ", ".join(map(str, teacher.pairs))
        raise KoalaError(f"the rule keeps pair {pairs[-1]} of {teacher.name}, where the teacher has pairs {have}")
    teacher_depths = tuple(teacher.depths[pair] for pair in pairs)
    if teacher.path == MID and rule.mid == "resnets":
        return Stage(teacher.name, teacher.path, pairs, (0,), teacher_depths)
    wanted = rule.depth.get(teacher.name, teacher_depths)
    per_pair = wanted if isinstance(wanted, tuple) else (wanted,) * len(pairs)
    depths = tuple(_layers(each, depth) for each, depth in zip(per_pair, teacher_depths, strict=True))
    for pair, depth, most in zip(pairs, depths, teacher_depths, strict=True):
        if depth > most:
            raise KoalaError(f"depth of {teacher.name}: {depth} layers, where the teacher's pair {pair} has {most}")
    return Stage(teacher.name, teacher.path, pairs, depths, teacher_depths)


def _layers(wanted: Depth, teacher: int) -> int:
    if isinstance(wanted, int):
        return wanted
    part, whole = map(int, wanted.split("/"))
    return -(-teacher * part // whole)  # rounded up: a student keeps one layer at least
