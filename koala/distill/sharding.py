"""The student sharded over the processes (FSDP2), its parts, and these gathered; a student that is not sharded passes unchanged.

fsdp2.yaml of infra/accelerate/ asks for it. Each process keeps its shard of the student's weights, gradients, optimizer
states and EMA; a block's weights are gathered while it computes. Teacher and text encoders are replicated: they hold no
gradients, and only half-precision weights.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from koala.distill.task import DistillTask

_UNITS = ("BasicTransformerBlock", "ResnetBlock2D")


def requested() -> bool:
    """Return whether the accelerate configuration that started this process says `distributed_type: FSDP`."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard(student: UNet2DConditionModel, accelerator: Accelerator) -> None:
    """Shard the student over all processes, in place: module names stay, parameters become DTensors.

    With bf16, weights are gathered in bfloat16 and gradients reduced in float32.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    policy = MixedPrecisionPolicy()
    if accelerator.mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in student.modules():
        if type(module).__name__ in _UNITS:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(student, mesh=mesh, mp_policy=policy)


def synchronised(wrapped: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """All-reduce gradients only in the last micro-batch of a step. `wrapped` is the task, or what DDP makes of it."""
    if isinstance(wrapped, DistillTask) and isinstance(wrapped.student, FSDPModule):
        wrapped.student.set_requires_gradient_sync(last)
    elif isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    return contextlib.nullcontext()


def reshard(student: nn.Module) -> None:
    """Give up the whole weights that a forward pass without a gradient leaves in place of the shards outside of blocks.

    They would stay, whatever is written to the shards, until the next backward pass.
    """
    if isinstance(student, FSDPModule):
        student.reshard()


def parameters(student: nn.Module) -> dict[str, nn.Parameter]:
    """Return the student's parameters by name, sharded where it is sharded."""
    reshard(student)
    return dict(student.named_parameters())


def parts(student: nn.Module) -> list[nn.Parameter]:
    """Return this process's part of each parameter: the parameter itself, or its shard, a plain tensor in the same memory.

    The optimizer, the EMA and the clipping take these. For a list of sharded tensors PyTorch would first derive how the result is
    sharded, in a time that is quadratic in its length: 28 s of a first step with 800 tensors on a CPU.
    """
    return [
        nn.Parameter(parameter.to_local().detach()) if isinstance(parameter, DTensor) else parameter
        for parameter in student.parameters()
    ]


def move_gradients(student: nn.Module, to: Sequence[nn.Parameter]) -> None:
    """Give the gradients of a sharded student to its `parts`; a student that is not sharded is its own part."""
    for parameter, part in zip(student.parameters(), to, strict=True):
        if isinstance(parameter.grad, DTensor):
            part.grad, parameter.grad = parameter.grad.to_local(), None


def gather(part: Tensor, parameter: Tensor) -> Tensor:
    """Return the whole of a tensor that is sharded as `parameter` is. Collective: every rank must call it."""
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements, strides = parameter.device_mesh, parameter.placements, parameter.stride()
    part = part.to(parameter.device)
    return DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=strides).full_tensor()


def gathered(student: nn.Module, of: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the whole of one part after another, such as an EMA's, with its parameter's name. Collective."""
    for (name, parameter), part in zip(parameters(student).items(), of, strict=True):
        yield name, gather(part.detach(), parameter)


@torch.no_grad()
def split(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's part of `tensor`, which is whole on every rank: on the parameter's device, with its strides.

    The strides matter: fused and 8-bit optimizers pair a weight with its states by their place in memory.
    """
    if isinstance(parameter, DTensor):
        placed = distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
        return placed.to_local()
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
