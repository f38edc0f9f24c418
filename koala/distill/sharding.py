"""The student sharded over the processes (FSDP2), and its tensors gathered; plain tensors pass unchanged.

fsdp2.yaml of infra/accelerate/ asks for it. Each process keeps its shard of the student's weights, gradients, optimizer
states and EMA; a block's weights are gathered while it computes. Teacher and text encoders are replicated: they hold no
gradients, and only half-precision weights.
"""

import contextlib
import os

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


def gather(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor. Collective: every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """Return `tensor`, whole on every rank, on the reference's device, with its strides and sharded as it is.

    The strides matter: fused and 8-bit optimizers pair a weight with its states by their place in memory.
    """
    if isinstance(reference, DTensor):
        return distribute_tensor(tensor.to(reference.device), reference.device_mesh, reference.placements)
    return torch.empty_like(reference, dtype=tensor.dtype).copy_(tensor)
