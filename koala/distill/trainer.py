"""What is trained, and the two halves of its step. The loop and the benchmark use the same ones.

for index, batch in enumerate(micro_batches, start=1):
    losses = trainer.backward(batch, last=index == trainer.accumulate)
norm = trainer.update(rate)
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor

from koala.distill import sharding
from koala.distill.config import DistillConfig
from koala.distill.data import Batch
from koala.distill.hooks import compile_modules
from koala.distill.launch_settings import micro_batch
from koala.distill.losses import total
from koala.distill.optimizer import build_optimizer
from koala.distill.task import DistillTask
from koala.unet.student import empty_unet


class Trainer:
    """The task on its device, compiled and sharded as the machine's settings say, the student's optimizer and its EMA."""

    def __init__(self, task: DistillTask, config: DistillConfig, accelerator: Accelerator) -> None:
        """Move the task to the accelerator's device and prepare it."""
        if config.machine.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the GPU's first product
            torch.use_deterministic_algorithms(True)  # with warn_only attention would stay as it is
        self._accelerator = accelerator
        self._config = config
        self._weights = config.weights.model_dump()
        self.micro_batch = micro_batch(config, accelerator.num_processes)
        self.accumulate = config.batch_size // (self.micro_batch * accelerator.num_processes)
        """Micro-batches of this process in a step."""
        self._task = task.to(accelerator.device)
        self.student = task.student
        for unet in (task.student, task.teacher):
            compile_modules(unet, config.machine.compile)
        if sharding.requested():
            sharding.shard(task.student, accelerator)
            self._wrapped = task
        else:
            self._wrapped = accelerator.prepare(task)
        self._parts = sharding.parts(task.student)
        self.optimizer = build_optimizer(config, self._parts)
        self.ema = EMAModel(self._parts, decay=config.ema_decay, foreach=True) if config.ema_decay else None
        if self.ema and config.machine.ema_offload:
            self.ema.to("cpu")

    def backward(self, batch: Batch, last: bool) -> dict[str, Tensor]:
        """Run forward and backward of a micro-batch. Return `total` and each loss term.

        Gradients are all-reduced in the `last` micro-batch of a step.
        """
        with sharding.synchronised(self._wrapped, last), self._accelerator.autocast():
            terms = self._wrapped(batch)
            loss = total(terms, self._weights)
        self._accelerator.backward(loss / self.accumulate)
        return {name: term.detach() for name, term in {"total": loss, **terms}.items()}

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Return `total` and each loss term of a micro-batch, without a gradient and without compiled layers."""
        eager = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), eager, self._accelerator.autocast():
            terms = self._task(batch)
            return {"total": total(terms, self._weights), **terms}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the student hold the weights that are released, the EMA where there is one, inside the block."""
        if not self.ema:
            yield
            return
        with torch.no_grad():
            trained = [part.clone() for part in self._parts]
            self._put(self.ema.shadow_params)
            try:
                yield
            finally:
                self._put(trained)

    def _put(self, weights: Sequence[Tensor]) -> None:
        """Let the student hold these weights, this process's part of each."""
        sharding.reshard(self.student)
        for part, tensor in zip(self._parts, weights, strict=True):
            part.copy_(tensor)

    def update(self, rate: float) -> float:
        """Take one optimizer step at learning rate `rate`, and one of the EMA. Return the gradient's norm.

        Where the norm is not finite, weights and EMA stay as they are.
        """
        sharding.move_gradients(self.student, self._parts)
        norm = self._clip_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if math.isfinite(norm):
            self.optimizer.step()
            if self.ema:
                self._step_ema(self.ema)
        self.optimizer.zero_grad()
        return norm

    def _clip_gradients(self) -> float:
        """Scale the gradients down to the greatest norm that is allowed. Return the norm that they had, over all parameters."""
        norm = torch.nn.utils.get_total_norm([part.grad for part in self._parts if part.grad is not None])
        if sharding.requested():
            norm = self._accelerator.reduce(norm.square(), "sum").sqrt()
        torch.nn.utils.clip_grads_with_norm_(self._parts, self._config.max_grad_norm, norm)
        return float(norm)

    def _step_ema(self, ema: EMAModel) -> None:
        if self._config.machine.ema_offload:
            ema.to(self._parts[0].device)
        ema.step(self._parts)
        if self._config.machine.ema_offload:
            ema.to("cpu")

    def released(self, dtype: torch.dtype, keep: bool) -> UNet2DConditionModel | None:
        """Return the U-Net to validate and to release, in the host's memory: the EMA where there is one.

        Collective: every rank must call it. Ranks with `keep=False` get None and hold no copy.
        """
        weights = {}
        for name, whole in sharding.gathered(self.student, self.ema.shadow_params if self.ema else self._parts):
            if keep:
                weights[name] = whole.to("cpu", dtype, copy=True).contiguous()
        if not keep:
            return None
        # Without the folder that the student was loaded from: the release holds no path of this machine.
        unet = empty_unet({name: value for name, value in self.student.config.items() if not name.startswith("_")})
        unet.load_state_dict(weights, assign=True)
        return unet.eval()
