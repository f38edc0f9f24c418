"""Resume state of distillation: safetensors and JSON, written atomically, the last few kept.

    STATE/step-00000200/{student,ema,optimizer}.safetensors, state.json

All else that a step depends on follows from the seed and the step (see koala.distill.data). Tensors are written whole,
so that any number of processes can resume from them.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from koala.distill import sharding
from koala.distill.job import checkpoints
from koala.errors import KoalaError


def save(
    folder: Path,
    step: int,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None,
    state: dict[str, Any],
    keep: int,
    write: bool = True,
) -> None:
    """Write the state after `step` steps, of which there is no checkpoint yet. A kill at any moment leaves the earlier ones whole.

    Collective: every rank must call it, because gathering a sharded tensor needs all of them. Ranks with `write=False`
    write nothing.
    """
    final = folder / f"step-{step:08d}"
    partial = final.with_suffix(".partial")
    if write:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _write(sharding.gathered(student, _parts(optimizer)), partial / "student.safetensors", write)
    _write(_optimizer_tensors(student, optimizer), partial / "optimizer.safetensors", write)
    if ema:
        _write(sharding.gathered(student, ema.shadow_params), partial / "ema.safetensors", write)
        state = {**state, "ema_steps": ema.optimization_step}  # its decay grows with them
    if not write:
        return
    (partial / "state.json").write_text(json.dumps({"step": step, **state}))
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    partial.rename(final)
    _sync(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def load(
    checkpoint: Path, student: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel | None
) -> dict[str, Any]:
    """Put a checkpoint's state into student, optimizer and EMA. Return what `save` was given as `state`, and `step`.

    Raises KoalaError where it is of a student of another shape.
    """
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    weights = load_file(checkpoint / "student.safetensors")
    parameters = sharding.parameters(student)
    if {name: tensor.shape for name, tensor in weights.items()} != {n: p.shape for n, p in parameters.items()}:
        raise KoalaError(f"{checkpoint} is of a student of another shape: move it away to start over")
    parts = dict(zip(parameters, _parts(optimizer), strict=True))
    with torch.no_grad():
        for name, part in parts.items():
            part.copy_(sharding.split(weights[name], parameters[name]))
        if ema:
            tensors = load_file(checkpoint / "ema.safetensors")
            for name, shadow in zip(parameters, ema.shadow_params, strict=True):
                shadow.copy_(sharding.split(tensors[name], parameters[name]))
            ema.optimization_step = state["ema_steps"]
    for full, tensor in load_file(checkpoint / "optimizer.safetensors").items():
        name, _, key = full.rpartition("/")
        parameter = parameters[name]
        placed = sharding.split(tensor, parameter) if tensor.shape == parameter.shape else tensor.to(parameter.device)
        # The 8-bit optimizer counts its steps in a plain number.
        optimizer.state[parts[name]][key] = int(tensor) if tensor.dtype == torch.int64 else placed
    return state


def _parts(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return what the optimizer trains: this process's part of each of the student's parameters, in their order."""
    found: list[nn.Parameter] = optimizer.param_groups[0]["params"]
    return found


def _optimizer_tensors(student: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield an optimizer's states, whole, under flat names: `conv_in.weight/exp_avg`."""
    for (name, parameter), part in zip(sharding.parameters(student).items(), _parts(optimizer), strict=True):
        for key, value in optimizer.state[part].items():
            # The 8-bit optimizer's tables are shared between parameters; a file holds each by itself.
            whole = sharding.gather(value, parameter) if key.startswith("exp_avg") else torch.as_tensor(value).clone()
            yield f"{name}/{key}", whole


def _write(tensors: Iterable[tuple[str, Tensor]], file: Path, write: bool) -> None:
    """Write tensors. Each is gathered by itself, and goes to the host's memory as it comes."""
    kept = {}
    for name, whole in tensors:
        if write:
            kept[name] = whole.to("cpu").contiguous()
    if write:
        save_file(kept, file)


def _sync(path: Path) -> None:
    """Have the disk hold what was written before anything that is written later."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
