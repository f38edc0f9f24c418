"""What learns, and the two halves of its step. The loop and the benchmark take the same ones.

for number, batch in enumerate(micro_batches, start=1):
    losses = learner.backward(batch, number)
norm = learner.update(rate)
"""

import math
import os

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from koala.distill import sharding
from koala.distill.batches import Batch
from koala.distill.capture import compile_layers
from koala.distill.config import DistillConfig
from koala.distill.losses import total
from koala.distill.optimizer import build_optimizer
from koala.distill.task import DistillTask


class Learner:
    """The task on its device, compiled and spread as the recipe says, the student's optimiser and its moving average.

    accumulate: micro-batches of this process in a step; average: what will be released, or None where the recipe has none.
    """

    def __init__(self, task: DistillTask, recipe: DistillConfig, accelerator: Accelerator) -> None:
        if recipe.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the GPU's first product
            torch.use_deterministic_algorithms(True)  # to warn only would leave attention as it is
        self._accelerator = accelerator
        self._recipe = recipe
        self._weights = recipe.weights.model_dump()
        self.accumulate = recipe.batch_size // (recipe.micro_batch * accelerator.num_processes)
        self.student = task.to(accelerator.device).student
        if recipe.compile:
            compile_layers(task.student)
            compile_layers(task.teacher)
        if sharding.asked():
            sharding.shard(task.student, accelerator)
            self._wrapped = task
        else:
            self._wrapped = accelerator.prepare(task)
        self._parameters = list(task.student.parameters())
        self.optimizer = build_optimizer(recipe, self._parameters)
        self.average = EMAModel(self._parameters, decay=recipe.ema_decay, foreach=True) if recipe.ema_decay else None
        if self.average and recipe.ema_offload:
            self.average.to("cpu")

    def backward(self, batch: Batch, number: int) -> dict[str, Tensor]:
        """Forward and backward of the `number`-th micro-batch of a step (from 1): `total` and each term by itself.

        The processes' gradients meet in the last micro-batch.
        """
        with sharding.synchronised(self._wrapped, last=number == self.accumulate), self._accelerator.autocast():
            terms = self._wrapped(batch)
            loss = total(terms, self._weights)
        self._accelerator.backward(loss / self.accumulate)
        return {name: term.detach() for name, term in {"total": loss, **terms}.items()}

    def update(self, rate: float) -> float:
        """One step of the optimiser at learning rate `rate`, and of the average; gives the gradient's norm.

        Where that is not finite, weights and average stay as they are.
        """
        norm = sharding.whole(torch.nn.utils.clip_grad_norm_(self._parameters, self._recipe.max_grad_norm)).item()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if math.isfinite(norm):
            self.optimizer.step()
            if self.average:
                self._step_average(self.average)
        self.optimizer.zero_grad()
        return norm

    def _step_average(self, average: EMAModel) -> None:
        if self._recipe.ema_offload:
            average.to(self._parameters[0].device)
        average.step(self._parameters)
        if self._recipe.ema_offload:
            average.to("cpu")
