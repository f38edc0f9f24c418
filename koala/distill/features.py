"""The features that a student learns to reproduce: which pairs of modules, as data.

A feature is the output (or, after a residual add, the input of what comes next) of a module of the U-Net, at the same
place in student and teacher: student pair i of a stage against the teacher's pair `stage.pairs[i]`, as in the weight map.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from koala.distill.config import FeatureConfig
from koala.errors import KoalaError
from koala.unet.blocks import Stage

# Within a transformer layer: the module whose output is the feature, and the one whose input is that output plus the
# residual. The feed-forward block ends the layer, so its residual sum is the output of the layer itself.
_BEFORE_ADD = {"self_attention": "attn1", "cross_attention": "attn2", "feed_forward": "ff"}
_AFTER_ADD = {"self_attention": "norm2", "cross_attention": "norm3"}


@dataclass(frozen=True)
class Tap:
    """Where a feature is read: a module's path in the U-Net, and its `output` or its `input`."""

    path: str
    side: Literal["input", "output"] = "output"


@dataclass(frozen=True)
class FeaturePair:
    """A feature of the student and the teacher's that it is compared with."""

    stage: str
    kind: str
    student: Tap
    teacher: Tap


def feature_pairs(features: str | Sequence[FeatureConfig], stages: Sequence[Stage]) -> tuple[FeaturePair, ...]:
    """Return the pairs that a configuration asks for, in the order of the forward pass for each kind.

    `koala`: self-attention of every stage that has it, and the last feature of the outer stages, which have none (paper,
    section 3.3). `bk-sdm`: the last feature of every stage. Raises KoalaError for a stage or a layer that lacks the kind,
    with those that have it, and for a pair named twice.
    """
    if features == "koala":
        outer = tuple(stage.name for stage in stages if not any(stage.depths) and stage.name != "Mid")
        configs = [FeatureConfig(kind="self_attention")]
        configs += [FeatureConfig(kind="last", stages=outer)] if outer else []
    elif features == "bk-sdm":
        configs = [FeatureConfig(kind="last")]
    else:
        configs = list(features)  # type: ignore[arg-type]
    pairs = [pair for config in configs for stage in _stages(config, stages) for pair in _pairs(config, stage)]
    for pair, count in Counter(pairs).items():
        if count > 1:
            raise KoalaError(f"the feature {pair.kind} of stage {pair.stage} is named twice: take one of them out")
    return tuple(pairs)


def _stages(config: FeatureConfig, stages: Sequence[Stage]) -> list[Stage]:
    able = {stage.name: stage for stage in stages if not config.of_layers or any(stage.depths)}
    for name in config.stages or ():
        if name not in able:
            raise KoalaError(f"the student has no feature {config.kind} in stage {name}: choose from {', '.join(able)}")
    chosen = [able[name] for name in config.stages or able]
    for stage in chosen:
        deepest = max(config.layers or (0,))
        if config.of_layers and deepest >= max(stage.depths):
            raise KoalaError(
                f"the student has no layer {deepest} in stage {stage.name}: choose from "
                f"{', '.join(map(str, range(max(stage.depths))))}"
            )
    return chosen


def _pairs(config: FeatureConfig, stage: Stage) -> Iterator[FeaturePair]:
    if config.kind == "last":
        tap = Tap(stage.path)
        yield FeaturePair(stage.name, config.kind, tap, tap)
    elif config.kind == "residual":
        for student, teacher in enumerate(stage.pairs):
            taps = (Tap(f"{stage.path}.resnets.{pair}") for pair in (student, teacher))
            yield FeaturePair(stage.name, config.kind, *taps)
    else:
        for student, (teacher, depth, full) in enumerate(
            zip(stage.pairs, stage.depths, stage.teacher_depths, strict=True)
        ):
            for layer, match in enumerate(match_layers(depth, full, config.match)):
                if config.layers is None or layer in config.layers:
                    taps = (_tap(config, stage, pair, at) for pair, at in ((student, layer), (teacher, match)))
                    yield FeaturePair(stage.name, config.kind, *taps)


def _tap(config: FeatureConfig, stage: Stage, pair: int, layer: int) -> Tap:
    block = f"{stage.path}.attentions.{pair}.transformer_blocks.{layer}"
    if not config.after_residual:
        return Tap(f"{block}.{_BEFORE_ADD[config.kind]}")
    if config.kind == "feed_forward":
        return Tap(block)
    return Tap(f"{block}.{_AFTER_ADD[config.kind]}", "input")


def match_layers(depth: int, full: int, how: Literal["first", "interleaved", "last"]) -> list[int]:
    """Return, for each of `depth` student layers, the one of the teacher's `full` layers that it is compared with.

    `first` gives 0, 1, 2, ...; `last` the deepest; `interleaved` spreads evenly from the first to the last.
    """
    if how == "first":
        return list(range(depth))
    if how == "last":
        return list(range(full - depth, full))
    if depth == 1:
        return [0]
    return [round(layer * (full - 1) / (depth - 1)) for layer in range(depth)]
