"""Reads features from a U-Net as it runs."""

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
    """Hooks that leave each tapped module's feature in an attribute of that module, and `recording()`, which collects them.

    The hooks are two plain functions without state of their own, so that torch.compile traces them as part of a block, once
    for all blocks of a kind. They must stand on the unwrapped modules before the first compiled call. Gradient
    checkpointing runs a block a second time, in backward: what that leaves behind is dropped by the next recording.
    """

    def __init__(self, unet: nn.Module, taps: Sequence[Tap]) -> None:
        self._taps = {tap: unet.get_submodule(tap.path) for tap in taps}
        for tap, module in self._taps.items():
            if tap.side == "output":
                module.register_forward_hook(_keep_output)
            else:
                module.register_forward_pre_hook(_keep_input)

    @contextmanager
    def recording(self) -> Iterator[dict[Tap, Tensor]]:
        """Gives a dict that holds the feature of every tap once the forward pass inside has ended.

        Raises RuntimeError where one was not met: training without a feature must not go unnoticed.
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
        """Let go of what passes outside a recording have left."""
        for tap, module in self._taps.items():
            module.__dict__.pop(_SLOTS[tap.side], None)


def _keep_output(module: nn.Module, _inputs: Any, output: Any) -> None:
    # A down block gives its hidden states and what it passes to the up blocks; the first is the feature.
    module._koala_output = output[0] if isinstance(output, tuple) else output


def _keep_input(module: nn.Module, inputs: Any) -> None:
    module._koala_input = inputs[0]


def compile_layers(unet: UNet2DConditionModel, **options: Any) -> None:
    """Compile the transformer layers of a U-Net one by one, in place, with their hooks. `options`: of torch.compile.

    A compiled layer serves every layer of its shape, so it must know whether it has hooks: without these guards a layer
    that was compiled without one would be taken for one that has one, and its feature would be missing.
    """
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.config.recompile_limit = 64  # layers with and without hooks, of each width and bucket
    unet.compile_repeated_blocks(fullgraph=True, **options)
