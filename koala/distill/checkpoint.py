"""Resume state of distillation: safetensors and JSON, written atomically, the last few kept.

    runs/distill/<fingerprint>/step-00000200/{student,average,optimizer}.safetensors, state.json

All else that a step depends on follows from the seed and the step (see koala.distill.batches).
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_NAME = re.compile(r"step-\d{8}")


def save(
    folder: Path,
    step: int,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: EMAModel | None,
    state: dict[str, Any],
    keep: int,
) -> None:
    """Write the state after `step` steps. A kill at any moment leaves the checkpoints before it whole."""
    final = folder / f"step-{step:08d}"
    partial = final.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_contiguous(student.state_dict()), partial / "student.safetensors")
    save_file(_flatten(optimizer.state_dict()["state"]), partial / "optimizer.safetensors")
    if average:
        save_file(_contiguous(_by_name(student, average.shadow_params)), partial / "average.safetensors")
        state = {**state, "average_steps": average.optimization_step}  # its decay grows with them
    (partial / "state.json").write_text(json.dumps({"step": step, **state}))
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def load(
    checkpoint: Path, student: nn.Module, optimizer: torch.optim.Optimizer, average: EMAModel | None
) -> dict[str, Any]:
    """Put a checkpoint's state into student, optimizer and average; gives what `state` held, and `step`."""
    student.load_state_dict(load_file(checkpoint / "student.safetensors"))
    fresh = optimizer.state_dict()
    optimizer.load_state_dict({**fresh, "state": _unflatten(load_file(checkpoint / "optimizer.safetensors"))})
    state = json.loads((checkpoint / "state.json").read_text())
    if average:
        tensors = load_file(checkpoint / "average.safetensors")
        for (name, _), shadow in zip(student.named_parameters(), average.shadow_params, strict=True):
            shadow.copy_(tensors[name])
        average.optimization_step = state["average_steps"]
    return state


def _by_name(student: nn.Module, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {name: tensor for (name, _), tensor in zip(student.named_parameters(), tensors, strict=True)}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _flatten(state: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """An optimizer's state, parameter number -> name -> tensor, as flat names: `12.exp_avg`."""
    return {
        f"{number}.{name}": tensor.contiguous() for number, entry in state.items() for name, tensor in entry.items()
    }


def _unflatten(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        number, _, name = full.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    return state


def _sync(path: Path) -> None:
    """Have the disk hold what was written before anything that is written later."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
