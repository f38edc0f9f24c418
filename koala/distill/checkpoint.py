"""Resume state of distillation: safetensors and JSON, written atomically, the last few kept.

    STATE/step-00000200/{student,ema,optimizer}.safetensors, state.json

All else that a step depends on follows from the seed and the step (see koala.distill.data). Tensors are written whole,
so that any number of processes can resume from them.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from koala.distill.job import checkpoints
from koala.distill.sharding import gather, like
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
    """Write the state after `step` steps. A kill at any moment leaves the earlier checkpoints whole.

    Collective: every rank must call it, because gathering a sharded tensor needs all of them. Ranks with `write=False`
    write nothing.
    """
    final = folder / f"step-{step:08d}"
    partial = final.with_suffix(".partial")
    if write:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _write(dict(student.named_parameters()), partial / "student.safetensors", write)
    _write(dict(_optimizer_tensors(student, optimizer)), partial / "optimizer.safetensors", write)
    if ema:
        _write(ema_weights(student, ema), partial / "ema.safetensors", write)
        state = {**state, "ema_steps": ema.optimization_step}  # its decay grows with them
    if not write:
        return
    (partial / "state.json").write_text(json.dumps({"step": step, **state}))
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    shutil.rmtree(final, ignore_errors=True)
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
    parameters = dict(student.named_parameters())
    if {name: tensor.shape for name, tensor in weights.items()} != {n: p.shape for n, p in parameters.items()}:
        raise KoalaError(f"{checkpoint} is of a student of another shape: move it away to start over")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(like(weights[name], parameter))
        if ema:
            tensors = load_file(checkpoint / "ema.safetensors")
            for name, shadow in ema_weights(student, ema).items():
                shadow.copy_(like(tensors[name], shadow))
            ema.optimization_step = state["ema_steps"]
    for full, tensor in load_file(checkpoint / "optimizer.safetensors").items():
        name, _, key = full.rpartition("/")
        parameter = parameters[name]
        placed = like(tensor, parameter) if tensor.shape == parameter.shape else tensor.to(parameter.device)
        # The 8-bit optimizer counts its steps in a plain number.
        optimizer.state[parameter][key] = int(tensor) if tensor.dtype == torch.int64 else placed
    return state


def ema_weights(student: nn.Module, ema: EMAModel) -> dict[str, Tensor]:
    """Return the EMA by the names of the student's parameters."""
    return {name: shadow for (name, _), shadow in zip(student.named_parameters(), ema.shadow_params, strict=True)}


def _optimizer_tensors(student: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield an optimizer's states under flat names: `conv_in.weight/exp_avg`."""
    for name, parameter in student.named_parameters():
        for key, value in optimizer.state[parameter].items():
            # The 8-bit optimizer's tables are shared between parameters; a file holds each by itself.
            yield f"{name}/{key}", value if key.startswith("exp_avg") else torch.as_tensor(value).clone()


def _write(tensors: Mapping[str, Tensor], file: Path, write: bool) -> None:
    """Gather tensors one by one, each to the host's memory as it comes, and write them."""
    kept = {}
    for name, tensor in tensors.items():
        whole = gather(tensor.detach())
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
