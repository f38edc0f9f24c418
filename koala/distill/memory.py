"""Memory of training on one device and on its host, by estimate, from a step run on meta tensors.

    estimate(job).total / GIB

The real task, its forward and its backward run on meta tensors, of which only the sizes exist; the largest sum of what
lives at once is the peak. Not counted: what CUDA and its libraries take themselves (about half a GiB) and fragmentation. On an
H200 the activations of SDXL's size took a tenth less than estimated, with compiled layers and with compiled residual blocks.
"""

import contextlib
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from koala.data.latents import LatentSet
from koala.distill import float8, launch_settings
from koala.distill.config import DistillConfig
from koala.distill.data import Batch
from koala.distill.features import feature_pairs
from koala.distill.job import Job
from koala.distill.launch_settings import micro_batch
from koala.distill.losses import total
from koala.distill.task import DistillTask
from koala.distill.text import TextConditioner
from koala.teacher.shape import TeacherShape, shape_of
from koala.unet.blocks import Stage
from koala.unet.student import empty_unet, read_stages, student_config

GIB = 2**30
CARDS = (8, 11, 16, 24, 32, 40, 48, 80, 141)
"""Memory of common cards, GiB."""

_STATES = {"adamw": 8.0, "adamw-8bit": 2.0 + 2 * 4 / 256}  # bytes a parameter; of 8 bits, a scale for each 256
_PROCESS = 1.2 * GIB  # of the host's memory for Python and its libraries, a training process
_VAE = 83_653_863  # SDXL's parameters


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, and on its host."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    teacher: int
    text_encoders: int
    activations: int
    """The peak of a step beyond what lies there all the time: what backward needs, features, half-precision copies of
    weights, temporaries."""
    host: int
    """The host's memory at its peak, for all processes of a machine: libraries, models while they are loaded, the EMA where
    it is offloaded, and a checkpoint while it is written. On a CPU it includes all the rest."""

    @property
    def total(self) -> int:
        """Bytes on one device."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return what the device holds, by name."""
        return {name: size for name, size in asdict(self).items() if name != "host"}

    def line(self) -> str:
        """Return the estimate as one line, in GiB."""
        parts = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.2f}" for name, size in self.parts().items() if size)
        return f"{self.total / GIB:.2f} GiB a device ({parts}), {self.host / GIB:.2f} GiB of the host's memory"


def estimate(job: Job) -> MemoryEstimate:
    """Return what a training takes for its largest bucket."""
    bucket = max(LatentSet(job.latents).buckets, key=lambda size: size[0] * size[1])
    return estimate_for(job.config, shape_of(job.teacher), read_stages(job.student), bucket)


def estimate_for(
    config: DistillConfig, teacher_shape: TeacherShape, stages: Sequence[Stage], bucket: tuple[int, int]
) -> MemoryEstimate:
    """Return what training takes for images of `bucket` (height, width, px), with attention that keeps no matrix.

    With FSDP2, weights, optimizer states and EMA are this device's share. Gradients are whole while micro-batches are
    accumulated, since they are reduced in a step's last one.
    """
    launch = launch_settings.check(config)
    unet, teacher = empty_unet(student_config(teacher_shape.unet, stages)), empty_unet(teacher_shape.unet)
    dtype = getattr(torch, config.teacher_dtype)
    teacher.to(dtype)
    if config.teacher_float8:
        float8.convert(teacher)
    size = micro_batch(config, launch.processes)
    accumulates = config.batch_size // launch.processes > size
    every = unet.num_parameters()
    share = every // launch.processes if launch.sharded else every
    pairs = feature_pairs(config.features, stages)
    teacher_bytes = _size(teacher)
    task = DistillTask(unet, teacher, _Text(teacher_shape.unet), DDPMScheduler(), pairs, config)
    device = {
        "weights": 4 * share,
        "gradients": 4 * (every if launch.sharded and accumulates else share),
        "optimizer": int(_STATES[config.optimizer] * share),
        "ema": 4 * share if config.ema_decay and not config.machine.ema_offload else 0,
        "teacher": teacher_bytes,
        "text_encoders": teacher_shape.text_parameters * dtype.itemsize,
        "activations": step_peak(task, _batch(teacher_shape, bucket, size), launch.bf16),
    }
    loading = 4 * every + teacher_bytes + device["text_encoders"] + _VAE * dtype.itemsize
    saving = int(_STATES[config.optimizer] * every)
    resident = _PROCESS + (4 * share if config.ema_decay and config.machine.ema_offload else 0)
    local = max(launch.processes // launch.machines, 1)
    if launch.use_cpu:
        host = local * (sum(device.values()) + resident + _VAE * dtype.itemsize)
    else:
        host = local * resident + max(local * loading, saving)
    return MemoryEstimate(**device, host=int(host))


def advice(config: DistillConfig) -> str:
    """Return what to change in params.yaml when memory does not suffice, the change that costs least first."""
    machine = config.machine
    if config.teacher_dtype == "float32":
        return "set distill.teacher_dtype to bfloat16"
    if not machine.gradient_checkpointing:
        return "set the machine's distill.gradient_checkpointing to true"
    if machine.micro_batch > 1:
        return f"set the machine's distill.micro_batch to {machine.micro_batch // 2}"
    if config.ema_decay and not machine.ema_offload:
        return "set the machine's distill.ema_offload to true"
    if config.optimizer == "adamw":
        return "set distill.optimizer to adamw-8bit"
    return "take the largest buckets out of encode.buckets, or shard over several GPUs (infra/accelerate/fsdp2.yaml)"


def step_peak(task: DistillTask, batch: Batch, bf16: bool) -> int:
    """Return the bytes that a forward and backward of `task` take at their peak, beyond weights and gradients."""
    compiled = task.config.machine.compile
    for parameter in task.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if task.config.machine.gradient_checkpointing:
        # Blocks are computed again in backward, under the autocast of their forward.
        context = lambda: (contextlib.nullcontext(), _Autocast(bf16, compiled))  # noqa: E731
        task.student.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, context_fn=context))
    with LiveBytes() as live:
        with _Autocast(bf16, compiled):
            loss = total(task(batch), task.config.weights.model_dump())
        loss.backward()
    return int(live.peak)


class LiveBytes(TorchDispatchMode):
    """Counter of the bytes of every tensor storage that is made inside, on any device; `peak` is the most at once."""

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count the storages that it made."""
        before = {id(t.untyped_storage()) for t in _tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if id(storage) not in before and storage not in self._known:
                self._known.add(storage)
                size = storage.nbytes()
                self.now += size
                weakref.finalize(storage, self._free, size)
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, size: int) -> None:
        self.now -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Autocast(TorchFunctionMode):
    """CUDA's autocast to bf16 for a U-Net's operations on meta tensors, which have none; attention as flash attention.

    What is compiled keeps neither the float32 copies that norms compute on nor the input of an activation function: its
    backward computes them again, inside its kernels.
    """

    def __init__(self, bf16: bool, compiled: Collection[str]) -> None:
        super().__init__()
        self._bf16 = bf16
        self._compiled = compiled
        self._copies: dict[int, Tensor] = {}  # as autocast, which casts each weight once a forward pass

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            return _Flash.apply(  # type: ignore[no-untyped-call]
                *(self._half(tensor) for tensor in args[:3] or [options[n] for n in ("query", "key", "value")])
            )
        if func is F.silu and "ResnetBlock2D" in self._compiled:
            return _Recomputed.apply(args[0])  # type: ignore[no-untyped-call]
        inside = {F.layer_norm: "BasicTransformerBlock", F.group_norm: "ResnetBlock2D"}.get(func)
        if self._bf16 and (func in (F.linear, F.conv2d, torch.conv2d) or inside in self._compiled):
            args = tuple(self._half(value) if isinstance(value, Tensor) else value for value in args)
        elif self._bf16 and inside:
            args = tuple(value.float() if isinstance(value, Tensor) else value for value in args)
            options = {name: v.float() if isinstance(v, Tensor) else v for name, v in options.items()}
        return func(*args, **options)

    def _half(self, tensor: Tensor) -> Tensor:
        if not self._bf16 or tensor.dtype != torch.float32:
            return tensor
        if not isinstance(tensor, nn.Parameter):
            return tensor.to(torch.bfloat16)
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.to(torch.bfloat16)
        return self._copies[id(tensor)]


class _Flash(torch.autograd.Function):
    """Attention that keeps what flash attention keeps: its inputs, its output and a number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _Recomputed(torch.autograd.Function):
    """A function of one tensor that keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.empty_like(gradients[0])


class _Text(TextConditioner):
    """Stand-in for the text encoders: states and pooled output of the shapes that the U-Net takes."""

    def __init__(self, unet: Mapping[str, Any]) -> None:
        nn.Module.__init__(self)
        self._width = unet["cross_attention_dim"]
        self._pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]

    def forward(self, tokens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        size, _, length = tokens.shape
        return tokens.new_empty(size, length, self._width, dtype=torch.float32), keep.new_empty(
            size, self._pooled, dtype=torch.float32
        )


def _batch(teacher: TeacherShape, bucket: tuple[int, int], size: int) -> Batch:
    meta = torch.device("meta")
    height, width = (side // teacher.latent_factor for side in bucket)
    latents = torch.empty(size, teacher.unet["in_channels"], height, width, device=meta)
    return Batch(
        samples=torch.empty(size, device=meta),
        latents=latents,
        noise=torch.empty_like(latents),
        timesteps=torch.empty(size, dtype=torch.long, device=meta),
        tokens=torch.empty(size, 2, teacher.tokens, dtype=torch.long, device=meta),
        keep=torch.empty(size, dtype=torch.bool, device=meta),
        time_ids=torch.empty(size, 6, device=meta),
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())
