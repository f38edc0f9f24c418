"""The distillation task: student, frozen teacher and losses in one module, whose forward returns named losses."""

import contextlib
from typing import Self

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from koala.distill.config import DistillConfig
from koala.distill.data import Batch
from koala.distill.features import FeaturePair
from koala.distill.hooks import Capture
from koala.distill.losses import min_snr_weight, mse, snr
from koala.distill.text import TextConditioner


class DistillTask(nn.Module):
    """L = L_task + L_outKD + sum of L_featKD (KOALA, section 3.3), before the weights.

    Only the student is trained: the teacher and the text encoders hold no gradients and stay in eval mode.
    """

    def __init__(
        self,
        student: UNet2DConditionModel,
        teacher: UNet2DConditionModel,
        text: TextConditioner,
        scheduler: DDPMScheduler,
        pairs: tuple[FeaturePair, ...],
        config: DistillConfig,
    ) -> None:
        """Freeze the teacher and hook the features of `pairs` in both U-Nets."""
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.text = text
        self.scheduler = scheduler
        self.pairs = pairs
        self.config = config
        self.student_features = Capture(student, [pair.student for pair in pairs])
        self.teacher_features = Capture(teacher, [pair.teacher for pair in pairs])
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Set the student's mode; teacher and text encoders stay in eval mode."""
        super().train(mode)
        self.teacher.eval()
        self.text.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the objective's terms, each a scalar in fp32: `task`, `output`, and `feature/STAGE` for each stage with pairs.

        A stage's feature term is the sum over its pairs of their mean squared errors.
        """
        noisy = self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        inputs = (noisy, batch.timesteps)
        with _own_dtype(noisy.device):
            states, pooled = self.text(batch.tokens, batch.keep)
            with torch.inference_mode(), self.teacher_features.recording() as taught:
                expected = _predict(self.teacher, *inputs, states, pooled, batch.time_ids)
        with self.student_features.recording() as captured:
            predicted = _predict(self.student, *inputs, states, pooled, batch.time_ids)
        weight = self._weight(batch.timesteps)
        losses = {
            "task": mse(predicted, self._target(batch), weight),
            "output": mse(predicted, expected, weight),
        }
        for pair in self.pairs:
            name = f"feature/{pair.stage}"
            losses[name] = losses.get(name, 0) + mse(captured[pair.student], taught[pair.teacher])
        return losses

    def _target(self, batch: Batch) -> Tensor:
        if self.scheduler.config.prediction_type == "v_prediction":
            velocity: Tensor = self.scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
            return velocity
        return batch.noise

    def _weight(self, timesteps: Tensor) -> Tensor | None:
        if self.config.min_snr_gamma is None:
            return None
        ratio = snr(self.scheduler.alphas_cumprod, timesteps)
        return min_snr_weight(ratio, self.config.min_snr_gamma, self.scheduler.config.prediction_type)


def _own_dtype(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Turn autocast off: the frozen models compute in their own dtype, norms too. Meta tensors have no autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _predict(
    unet: UNet2DConditionModel, noisy: Tensor, timesteps: Tensor, states: Tensor, pooled: Tensor, time_ids: Tensor
) -> Tensor:
    dtype = unet.conv_in.weight.dtype  # `unet.dtype` walks through all modules: milliseconds
    predicted: Tensor = unet(
        noisy.to(dtype),
        timesteps,
        encoder_hidden_states=states.to(dtype),
        added_cond_kwargs={"text_embeds": pooled.to(dtype), "time_ids": time_ids},
    ).sample
    return predicted
