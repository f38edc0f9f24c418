"""The student spread over the processes (FSDP2), and its tensors put together again; plain tensors pass unchanged.

fsdp2.yaml of infra/accelerate/ asks for it. Each process keeps its part of the student's weights, gradients, optimiser
state and moving average; a block's weights come together while it computes. Teacher and text encoders are whole
everywhere: they hold no gradients, and half-precision weights alone.
"""

import contextlib
import os

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from koala.distill.task import DistillTask

_UNITS = ("BasicTransformerBlock", "ResnetBlock2D")


def asked() -> bool:
    """Whether the accelerate configuration that started this process says `distributed_type: FSDP`."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard(student: UNet2DConditionModel, accelerator: Accelerator) -> None:
    """Spread the student over all processes, in place: module names stay, parameters become DTensors."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in student.modules():
        if type(module).__name__ in _UNITS:
            fully_shard(module, mesh=mesh)
    fully_shard(student, mesh=mesh)


def synchronised(wrapped: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Gradients meet in the last micro-batch of a step alone; `wrapped` is the task, or what DDP makes of it."""
    if isinstance(wrapped, DistillTask) and isinstance(wrapped.student, FSDPModule):
        wrapped.student.set_requires_gradient_sync(last)
    elif isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    return contextlib.nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is spread over the processes; all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """`tensor`, which every process has whole, on the reference's device and spread as it is."""
    tensor = tensor.to(reference.device)
    if isinstance(reference, DTensor):
        return distribute_tensor(tensor, reference.device_mesh, reference.placements)
    return tensor
