"""Hooks that capture a U-Net's features as it runs, and the compilation that keeps them working."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from koala.distill.features import Tap

_SLOTS = {"output": "_koala_output", "input": "_koala_input"}


class Capture:
    """Hooks that store each tapped module's feature in an attribute of that module, and `recording()`, which collects them.

    The hooks are two plain functions without state, so that torch.compile traces them as part of a block, once for all
    blocks of a kind. They must be registered on the unwrapped modules before the first compiled call. Gradient
    checkpointing runs a block again in backward: the next recording drops what that leaves behind.
    """

    def __init__(self, unet: nn.Module, taps: Sequence[Tap]) -> None:
        """Register a hook for every tap."""
        self._taps = {tap: unet.get_submodule(tap.path) for tap in taps}
        for tap, module in self._taps.items():
            if tap.side == "output":
                module.register_forward_hook(_keep_output)
            else:
                module.register_forward_pre_hook(_keep_input)

    @contextmanager
    def recording(self) -> Iterator[dict[Tap, Tensor]]:
        """Yield a dict that holds the feature of every tap once the forward pass inside has ended.

        Raises RuntimeError where one was not captured: training without a feature must not go unnoticed.
        """
        found: dict[Tap, Tensor] = {}
        self.clear()
        yield found
        for tap, module in self._taps.items():
            feature = module.__dict__.pop(_SLOTS[tap.side], None)
            if feature is not None:
                found[tap] = feature
        if len(found) != len(self._taps):
            missing = [tap.path for tap in self._taps if tap not in found]
            raise RuntimeError(
                f"{len(missing)} of {len(self._taps)} features were not captured, {missing[0]} the first"
            )

    def clear(self) -> None:
        """Drop features left by forward passes made outside `recording()`."""
        for tap, module in self._taps.items():
            module.__dict__.pop(_SLOTS[tap.side], None)


def _keep_output(module: nn.Module, _inputs: Any, output: Any) -> None:
    # A down block returns its hidden states and its skips; the first is the feature.
    module._koala_output = output[0] if isinstance(output, tuple) else output


def _keep_input(module: nn.Module, inputs: Any) -> None:
    module._koala_input = inputs[0]


def compile_modules(unet: UNet2DConditionModel, classes: Sequence[str], **options: Any) -> None:
    """Compile the modules of these classes one by one, in place, with their hooks. `options` are torch.compile's.

    What is compiled serves every module of its shape, so it must guard on hooks: otherwise a layer that was compiled
    without one would be reused for a layer that has one, and its feature would be missing. Shapes are static: with
    automatic dynamic shapes, the second width or bucket would recompile every layer with symbolic sizes, which are slower.
    """
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.config.recompile_limit = 256  # modules with and without hooks, of each width and bucket
    for module in unet.modules():
        if type(module).__name__ in classes:
            module.compile(fullgraph=True, dynamic=False, **options)
