"""How much memory training takes on one device, before there is a device: a step run for its shapes alone.

    estimate(params, "koala-700m").total / GIB

The real task, its forward and its backward run on meta tensors, of which only the sizes exist; the largest sum of what
lives at once is the peak. Left out: what CUDA and its libraries take themselves (about half a GiB) and fragmentation.
"""

import contextlib
import json
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from koala.config import Params, load
from koala.demo.config import LATENT_CHANNELS, TOKENS, TinyTeacherConfig
from koala.distill import float8
from koala.distill.batches import Batch
from koala.distill.conditioning import TextConditioner
from koala.distill.config import DistillConfig
from koala.distill.features import feature_pairs
from koala.distill.losses import total
from koala.distill.task import DistillTask
from koala.errors import KoalaError
from koala.unet.blocks import keep
from koala.unet.build import empty_unet, student_config
from koala.unet.reference import TEXT_TOKENS, VAE_FACTOR

GIB = 2**30
CARDS = (8, 11, 16, 24, 32, 40, 48, 80, 141)
"""Memory of common cards, GiB."""

SDXL_TEXT_PARAMETERS = 123_060_480 + 694_659_840  # CLIP-L and OpenCLIP bigG
_MOMENTS = {"adamw": 8.0, "adamw-8bit": 2.0 + 2 * 4 / 256}  # bytes a parameter; of 8 bits, a scale for each 256


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device. activations: the peak of a step beyond what lies there all the time: what backward needs,
    features, half-precision copies of weights, temporaries.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    teacher: int
    text_encoders: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def line(self) -> str:
        """The estimate as one line, in GiB."""
        parts = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.2f}" for name, size in asdict(self).items() if size)
        return f"{self.total / GIB:.2f} GiB a device ({parts})"


def estimate(params: Params, student: str) -> MemoryEstimate:
    """What training `student` takes at the profile's settings, for its largest bucket, with attention that keeps no matrix.

    With FSDP2, weights, gradients, moments and average are this device's share. Raises KoalaError for an unknown student.
    """
    recipe, teacher_config = params.distill, params.teacher_unet()
    stages = keep(teacher_config, params.student(student))
    config = student_config(teacher_config, stages)
    launch = launch_settings(recipe)
    shares = int(launch.get("num_processes", 1)) if launch.get("distributed_type") == "FSDP" else 1
    unet, teacher = empty_unet(config), empty_unet(teacher_config)
    teacher.to(getattr(torch, recipe.teacher_dtype))
    if recipe.teacher_float8:
        float8.convert(teacher)
    parameters, teacher_bytes = unet.num_parameters() // shares, _size(teacher)
    task = DistillTask(
        unet, teacher, _Text(teacher_config), DDPMScheduler(), feature_pairs(recipe.features, stages), recipe
    )
    return MemoryEstimate(
        weights=4 * parameters,
        gradients=4 * parameters,
        optimizer=int(_MOMENTS[recipe.optimizer] * parameters),
        average=4 * parameters if recipe.ema_decay and not recipe.ema_offload else 0,
        teacher=teacher_bytes,
        text_encoders=_text_parameters(params) * getattr(torch, recipe.teacher_dtype).itemsize,
        activations=step_peak(task, _batch(params, recipe), launch.get("mixed_precision") == "bf16"),
    )


def advice(recipe: DistillConfig) -> str:
    """What to change in params.yaml when memory does not suffice, the change that costs least first."""
    if recipe.teacher_dtype == "float32":
        return "set distill.teacher_dtype to bfloat16"
    if not recipe.gradient_checkpointing:
        return "set distill.gradient_checkpointing to true"
    if recipe.micro_batch > 1:
        return f"set distill.micro_batch to {recipe.micro_batch // 2}"
    if recipe.ema_decay and not recipe.ema_offload:
        return "set distill.ema_offload to true"
    if recipe.optimizer == "adamw":
        return "set distill.optimizer to adamw-8bit"
    return "take the largest buckets out of encode.buckets, or spread over several GPUs (infra/accelerate/fsdp2.yaml)"


def step_peak(task: DistillTask, batch: Batch, bf16: bool) -> int:
    """Bytes that a forward and backward of `task` take at their peak, beyond weights and gradients, which are there before."""
    for parameter in task.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if task.config.gradient_checkpointing:
        # Blocks are computed again in backward, under the autocast of their forward.
        context = lambda: (contextlib.nullcontext(), _Autocast(bf16))  # noqa: E731
        task.student.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, context_fn=context))
    with LiveBytes() as live:
        with _Autocast(bf16):
            loss = total(task(batch), task.config.weights.model_dump())
        loss.backward()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of every tensor storage that is made inside, on any device; `peak` is the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
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
    """What CUDA's autocast to bf16 does to a U-Net's operations; meta tensors have none. Attention stands in for flash's."""

    def __init__(self, bf16: bool) -> None:
        super().__init__()
        self._bf16 = bf16
        self._copies: dict[int, Tensor] = {}  # as autocast, which casts each weight once a forward pass

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            return _Flash.apply(
                *(self._half(tensor) for tensor in args[:3] or [options[n] for n in ("query", "key", "value")])
            )
        if self._bf16 and func in (F.linear, F.conv2d, torch.conv2d):
            args = tuple(self._half(value) if isinstance(value, Tensor) else value for value in args)
        elif self._bf16 and func in (F.layer_norm, F.group_norm):
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
    """Attention that keeps its inputs, its output and a number a row: what flash attention keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _Text(TextConditioner):
    """In place of the text encoders: states and pooled output of the shapes that the U-Net takes."""

    def __init__(self, unet: Mapping[str, Any]) -> None:
        nn.Module.__init__(self)
        self._width = unet["cross_attention_dim"]
        self._pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]

    def forward(self, tokens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        size, _, length = tokens.shape
        return tokens.new_empty(size, length, self._width, dtype=torch.float32), keep.new_empty(
            size, self._pooled, dtype=torch.float32
        )


def _batch(params: Params, recipe: DistillConfig) -> Batch:
    height, width = max(params.encode.buckets, key=lambda bucket: bucket[0] * bucket[1])
    factor, length = VAE_FACTOR, TEXT_TOKENS
    if isinstance(params.teacher, TinyTeacherConfig):
        factor, length = 2 ** (len(params.teacher.vae_channels) - 1), TOKENS
    size, meta = recipe.micro_batch, torch.device("meta")
    latents = torch.empty(size, LATENT_CHANNELS, height // factor, width // factor, device=meta)
    return Batch(
        numbers=torch.empty(size, device=meta),
        latents=latents,
        noise=torch.empty_like(latents),
        timesteps=torch.empty(size, dtype=torch.long, device=meta),
        tokens=torch.empty(size, 2, length, dtype=torch.long, device=meta),
        keep=torch.empty(size, dtype=torch.bool, device=meta),
        time_ids=torch.empty(size, 6, device=meta),
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())


def launch_settings(recipe: DistillConfig) -> dict[str, Any]:
    """What the accelerate configuration that `recipe.launch` names says. Raises KoalaError where there is no such file."""
    file = Path(recipe.launch)
    if not file.is_file():
        raise KoalaError(f"distill.launch names {file}, which is not there: choose one of infra/accelerate/")
    return yaml.safe_load(file.read_text())


def _text_parameters(params: Params) -> int:
    if not isinstance(params.teacher, TinyTeacherConfig):
        return SDXL_TEXT_PARAMETERS
    width = params.teacher.text_width
    return 2 * 2 * 8 * width * width  # two encoders of two layers: 4 w^2 of attention, 4 w^2 of feed-forward


def show(student: str, profile: str | None, as_json: bool) -> None:
    """What `koala inspect STUDENT --training` prints. Raises KoalaError for an unknown student or profile."""
    params = load(profile=profile)
    params.student(student)
    found = estimate(params, student)
    if as_json:
        fits = {str(card): found.total <= card * GIB for card in CARDS}
        print(
            json.dumps(
                {"student": student, "profile": params.profile, **asdict(found), "total": found.total, "fits_gib": fits}
            )
        )
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    recipe = params.distill
    table = Table(box=box.SIMPLE, show_footer=True)
    table.add_column("what", footer="total")
    table.add_column("GiB", footer=f"{found.total / GIB:.2f}", justify="right")
    for name, size in asdict(found).items():
        table.add_row(name.replace("_", " "), f"{size / GIB:.2f}")
    console = Console(highlight=False)
    console.print(f"Memory of training {student} at profile {params.profile}, one device", soft_wrap=True)
    console.print(table)
    console.print(
        f"micro_batch {recipe.micro_batch}, gradient_checkpointing {recipe.gradient_checkpointing}, "
        f"optimizer {recipe.optimizer}, teacher_dtype {recipe.teacher_dtype}, {recipe.launch}",
        soft_wrap=True,
    )
    # A tenth stays for CUDA itself and for fragmentation.
    smallest = next((card for card in CARDS if found.total * 1.1 <= card * GIB), None)
    console.print(
        f"fits a card of {smallest} GiB" if smallest else f"fits no common card: {advice(recipe)}", soft_wrap=True
    )
