"""The plain recipe, the baseline: a step of distillation as the published scripts for SDXL-class models take it.

Images are decoded and encoded by the VAE, and captions by the text encoders, in every step. Features are read by hooks on
whole blocks (the last feature of every stage, BK-SDM). Everything is eager: attention by diffusers' default (SDPA), the
student in float32 under autocast, the frozen models in half precision, AdamW and EMA with their defaults.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextConfig

from koala.bench.models import random_tokens
from koala.distill.config import DistillConfig
from koala.distill.launch_settings import micro_batch
from koala.distill.text import TextConditioner

_FILES = 8  # different files; each is decoded every time it is read


class PlainTrainer:
    """The baseline's counterpart of koala.distill.trainer.Trainer, with the same two halves of a step."""

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        student: UNet2DConditionModel,
        blocks: Sequence[str],
        recipe: DistillConfig,
        device: torch.device,
        half: torch.dtype,
    ) -> None:
        """Prepare the models.

        `blocks` are paths of the stages that student and teacher share. `half` is what autocast computes in, float32 for
        none.
        """
        self._recipe, self._device, self._half = recipe, device, half
        self._micro_batch = micro_batch(recipe, 1)
        self.accumulate = recipe.batch_size // self._micro_batch
        self.vae = pipeline.vae.to(device).requires_grad_(False)
        self.text = TextConditioner(pipeline).to(device)
        self.teacher = pipeline.unet.to(device).requires_grad_(False).eval()
        self.student = student.to(device).train()
        if recipe.machine.gradient_checkpointing:
            self.student.enable_gradient_checkpointing()
        self._scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self._found: dict[str, dict[str, Tensor]] = {"teacher": {}, "student": {}}
        for name, unet in (("teacher", self.teacher), ("student", self.student)):
            for block in blocks:
                unet.get_submodule(block).register_forward_hook(self._keep(name, block))
        self._parameters = list(student.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self._ema = EMAModel(self._parameters, decay=recipe.ema_decay) if recipe.ema_decay else None

    def _keep(self, name: str, block: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            self._found[name][block] = output[0] if isinstance(output, tuple) else output

        return hook

    def backward(self, batch: tuple[Tensor, Tensor, Tensor], last: bool) -> None:
        """Run forward and backward of a micro-batch: images B x 3 x H x W in 0..255, tokens B x 2 x T, time ids B x 6."""
        images, tokens, time_ids = (tensor.to(self._device) for tensor in batch)
        with torch.no_grad():
            pixels = images.to(self.vae.dtype) / 127.5 - 1
            latents = self.vae.encode(pixels).latent_dist.sample()
            latents = latents.float() * self.vae.config.scaling_factor
            kept = torch.rand(len(latents), device=self._device) >= self._recipe.caption_dropout
            states, pooled = self.text(tokens, kept)
            noise = torch.randn_like(latents)
            timesteps = torch.randint(1000, (len(latents),), device=self._device)
            noisy = self._scheduler.add_noise(latents, noise, timesteps)
            condition = {
                "encoder_hidden_states": states,
                "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids},
            }
            expected = self.teacher(noisy.to(self.teacher.dtype), timesteps, **condition).sample
        with torch.autocast(self._device.type, self._half, enabled=self._half != torch.float32):
            predicted = self.student(noisy, timesteps, **condition).sample
            loss = F.mse_loss(predicted.float(), noise.float()) + F.mse_loss(predicted.float(), expected.float())
            for block, feature in self._found["student"].items():
                loss = loss + F.mse_loss(feature.float(), self._found["teacher"][block].float())
        (loss / self.accumulate).backward()

    def update(self, rate: float) -> float:
        """Take one step of the optimizer and of the EMA. Return the gradient's norm."""
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._recipe.max_grad_norm))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._ema:
            self._ema.step(self._parameters)
        return norm


class _Images(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """JPEG files of `size` x `size` pixels in memory, decoded when they are read: 3 x size x size, 0..255."""

    def __init__(self, text: CLIPTextConfig, size: int, count: int) -> None:
        self._text, self._size, self._count = text, size, count
        self._files = [_jpeg(seed, size) for seed in range(_FILES)]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image = Image.open(io.BytesIO(self._files[index % _FILES])).convert("RGB")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # bytes: a quarter of what floats would send
        time_ids = torch.tensor([self._size, self._size, 0, 0, self._size, self._size])
        return pixels, random_tokens(self._text, 1)[0], time_ids


def _jpeg(seed: int, size: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (max(size // 16, 1),) * 2 + (3,), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def load(text: CLIPTextConfig, size: int, recipe: DistillConfig) -> Iterator[Iterator[tuple[Tensor, Tensor, Tensor]]]:
    """Yield the micro-batches of every step of the recipe, on the CPU."""
    images = _Images(text, size, recipe.steps * recipe.batch_size)
    size_of_batch = micro_batch(recipe, 1)
    batches = iter(DataLoader(images, size_of_batch, num_workers=recipe.machine.workers))
    for _ in range(recipe.steps):
        yield islice(batches, recipe.batch_size // size_of_batch)
