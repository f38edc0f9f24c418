"""The features that a student learns to reproduce: which pairs of modules, as data, and how their outputs are captured.

A feature is the output (or, after a residual add, the input of what comes next) of a module of the U-Net, at the same
place in student and teacher: student pair i of a stage against the teacher's pair `stage.pairs[i]`, as in the weight map.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

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
    """The pairs that a configuration asks for, in the order of the forward pass for each kind.

    `koala`: self-attention of every stage that has it, and the last feature of the outer stages, which have none (paper,
    section 3.3). `bk-sdm`: the last feature of every stage. Raises KoalaError for a stage that lacks the kind, with the
    stages that have it.
    """
    if features == "koala":
        outer = tuple(stage.name for stage in stages if not any(stage.depths) and stage.name != "Mid")
        configs = [FeatureConfig(kind="self_attention")]
        configs += [FeatureConfig(kind="last", stages=outer)] if outer else []
    elif features == "bk-sdm":
        configs = [FeatureConfig(kind="last")]
    else:
        configs = list(features)  # type: ignore[arg-type]
    return tuple(pair for config in configs for stage in _stages(config, stages) for pair in _pairs(config, stage))


def _stages(config: FeatureConfig, stages: Sequence[Stage]) -> list[Stage]:
    able = {stage.name: stage for stage in stages if config.kind in ("residual", "last") or any(stage.depths)}
    for name in config.stages or ():
        if name not in able:
            raise KoalaError(f"the student has no feature {config.kind} in stage {name}: choose from {', '.join(able)}")
    return [able[name] for name in config.stages or able]


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
            for layer, match in enumerate(match_layers(depth, full, config.layers)):
                yield FeaturePair(
                    stage.name, config.kind, _tap(config, stage, student, layer), _tap(config, stage, teacher, match)
                )


def _tap(config: FeatureConfig, stage: Stage, pair: int, layer: int) -> Tap:
    block = f"{stage.path}.attentions.{pair}.transformer_blocks.{layer}"
    if not config.after_residual:
        return Tap(f"{block}.{_BEFORE_ADD[config.kind]}")
    if config.kind == "feed_forward":
        return Tap(block)
    return Tap(f"{block}.{_AFTER_ADD[config.kind]}", "input")


def match_layers(depth: int, full: int, how: Literal["first", "interleaved", "last"]) -> list[int]:
    """For each of `depth` student layers, the one of the teacher's `full` layers that it is compared with.

    first: 0, 1, 2 ...; last: the deepest; interleaved: spread evenly from the first to the last.
    """
    if how == "first":
        return list(range(depth))
    if how == "last":
        return list(range(full - depth, full))
    if depth == 1:
        return [0]
    return [round(layer * (full - 1) / (depth - 1)) for layer in range(depth)]


class Capture:
    """Reads features from a U-Net as it runs.

    Hooks are put on the unwrapped modules once, before anything is compiled. They record only inside `recording()`:
    gradient checkpointing runs a block's forward a second time, during backward, and that run must leave no trace.
    """

    def __init__(self, unet: nn.Module, taps: Sequence[Tap]) -> None:
        self._taps = tuple(dict.fromkeys(taps))
        self._found: dict[Tap, Tensor] | None = None
        for tap in self._taps:
            module = unet.get_submodule(tap.path)
            if tap.side == "output":
                module.register_forward_hook(self._output_hook(tap))
            else:
                module.register_forward_pre_hook(self._input_hook(tap))

    def _output_hook(self, tap: Tap) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._found is not None:
                # A down block gives its hidden states and what it passes to the up blocks; the first is the feature.
                self._found[tap] = output[0] if isinstance(output, tuple) else output

        return hook

    def _input_hook(self, tap: Tap) -> Any:
        def hook(_module: nn.Module, inputs: Any) -> None:
            if self._found is not None:
                self._found[tap] = inputs[0]

        return hook

    @contextmanager
    def recording(self) -> Iterator[dict[Tap, Tensor]]:
        """Record the features of the forward pass inside; every tap must have been met once it ends.

        Raises RuntimeError where some were not: training without a feature must not go unnoticed.
        """
        found: dict[Tap, Tensor] = {}
        self._found = found
        try:
            yield found
        finally:
            self._found = None
        if len(found) != len(self._taps):
            missing = [tap.path for tap in self._taps if tap not in found]
            raise RuntimeError(
                f"{len(missing)} of {len(self._taps)} features were not captured, {missing[0]} the first"
            )
