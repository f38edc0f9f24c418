"""Resume state of distillation: safetensors and JSON, written atomically, the last few kept.

    runs/distill/<student>/<fingerprint>/step-00000200/{student,average,optimizer}.safetensors, state.json

All else that a step depends on follows from the seed and the step (see koala.distill.batches). Tensors are written whole,
so that any number of processes can go on from them.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from koala.distill.sharding import like, whole
from koala.errors import KoalaError

_NAME = re.compile(r"step-\d{8}")


def save(
    folder: Path,
    step: int,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: EMAModel | None,
    state: dict[str, Any],
    keep: int,
    write: bool = True,
) -> None:
    """Write the state after `step` steps. A kill at any moment leaves the checkpoints before it whole.

    Every process calls it, since a sharded tensor comes together only then; those with `write` off write nothing.
    """
    final = folder / f"step-{step:08d}"
    partial = final.with_suffix(".partial")
    if write:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _write(dict(student.named_parameters()), partial / "student.safetensors", write)
    _write(dict(_optimizer_tensors(student, optimizer)), partial / "optimizer.safetensors", write)
    if average:
        _write(average_weights(student, average), partial / "average.safetensors", write)
        state = {**state, "average_steps": average.optimization_step}  # its decay grows with them
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


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `state`, and `step`."""
    return json.loads((checkpoint / "state.json").read_text())


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The parameters of distillation whose values differ, `learning_rate 1e-05 (now 2e-05), ...`; empty: none do."""
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return ", ".join(f"{name} {then.get(name)} (now {now.get(name)})" for name in names)


def load(
    checkpoint: Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: EMAModel | None,
    learnt: Mapping[str, Any],
) -> dict[str, Any]:
    """Put a checkpoint's state into student, optimizer and average; gives what `read_state` does.

    Raises KoalaError where it is of another configuration than `learnt`, with the difference, or of another student.
    """
    state = read_state(checkpoint)
    if differs := difference(state["learnt"], learnt):
        raise KoalaError(
            f"{checkpoint} is of another configuration: distill.{differs}: restore that to go on, or move it away to start over"
        )
    weights = load_file(checkpoint / "student.safetensors")
    parameters = dict(student.named_parameters())
    if {name: tensor.shape for name, tensor in weights.items()} != {n: p.shape for n, p in parameters.items()}:
        raise KoalaError(f"{checkpoint} is of a student of another shape: move it away to start over")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(like(weights[name], parameter))
        if average:
            tensors = load_file(checkpoint / "average.safetensors")
            for name, shadow in average_weights(student, average).items():
                shadow.copy_(like(tensors[name], shadow))
            average.optimization_step = state["average_steps"]
    for full, tensor in load_file(checkpoint / "optimizer.safetensors").items():
        name, _, key = full.rpartition("/")
        parameter = parameters[name]
        spread = like(tensor, parameter) if tensor.shape == parameter.shape else tensor.to(parameter.device)
        # Moments of 8 bits count their steps in a plain number.
        optimizer.state[parameter][key] = int(tensor) if tensor.dtype == torch.int64 else spread
    return state


def average_weights(student: nn.Module, average: EMAModel) -> dict[str, Tensor]:
    """The moving average by the names of the student's parameters."""
    return {name: shadow for (name, _), shadow in zip(student.named_parameters(), average.shadow_params, strict=True)}


def _optimizer_tensors(student: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """An optimizer's state as flat names: `conv_in.weight/exp_avg`."""
    for name, parameter in student.named_parameters():
        for key, value in optimizer.state[parameter].items():
            # The 8-bit optimiser's tables are shared between parameters; a file holds each by itself.
            yield f"{name}/{key}", value if key.startswith("exp_avg") else torch.as_tensor(value).clone()


def _write(tensors: Mapping[str, Tensor], file: Path, write: bool) -> None:
    gathered = ((name, whole(tensor.detach())) for name, tensor in tensors.items())
    kept = {name: tensor.contiguous() for name, tensor in gathered if write}
    if write:
        save_file(kept, file)


def _sync(path: Path) -> None:
    """Have the disk hold what was written before anything that is written later."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
