"""Training of a tiny teacher: a VAE, two CLIP text encoders and a U-Net of SDXL's own classes, on captioned images.

It has two parts: the VAE (L2 and a little KL), then text encoders and U-Net together (epsilon prediction). The first is kept
with the random state that it left, so that an interrupted run resumes with the second and ends with the same weights.
"""

import copy
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from koala.console import hide_loading_bars, progress
from koala.run import Run
from koala.teacher.config import LATENT_CHANNELS, TOKENS, FitConfig, TinyTeacher
from koala.teacher.shape import read_json
from koala.teacher.vocabulary import byte_pairs

POSTERIOR_STD = 0.2
"""Standard deviation of the VAE's posterior before training, where that of the latents is about 1."""
KL_WEIGHT = 1e-5

_RANDOM_STATE = "random_state.safetensors"


def train(config: TinyTeacher, to: Path, state: Path, run: Run) -> None:
    """Train the teacher and save its pipeline in the folder `to`; a finished VAE is kept in `state`."""
    hide_loading_bars()
    torch.manual_seed(config.seed)
    images, captions, sides = _images(config)
    vae = _once(state / "vae", lambda: fit_vae(config, images, run))
    pipeline = build_pipeline(config, vae)
    fit_unet(config, pipeline, encode(vae, images), captions, sides, run)
    pipeline.save_pretrained(to, safe_serialization=True)
    file = to / "vae" / "config.json"
    content = read_json(file)
    content.pop("_name_or_path", None)  # the folder of unfinished work: the same teacher is the same bytes anywhere
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _once(folder: Path, make: Callable[[], AutoencoderKL]) -> AutoencoderKL:
    """Load the VAE that an earlier run finished, with the random state that it left, or make and keep it."""
    if folder.is_dir():
        torch.set_rng_state(load_file(folder / _RANDOM_STATE)["state"])
    else:
        partial = folder.with_suffix(".partial")
        make().save_pretrained(partial, safe_serialization=True)
        save_file({"state": torch.get_rng_state()}, partial / _RANDOM_STATE)
        partial.rename(folder)
    return AutoencoderKL.from_pretrained(folder, use_safetensors=True)


def _images(config: TinyTeacher) -> tuple[Tensor, list[str], Tensor]:
    """Return images N x 3 x side x side in -1..1, their captions, and N sides (px) that are passed as the original size."""
    images = torch.stack([to_tensor(image) for image in config.images.images(config.image_size)])
    sides = torch.randint(config.image_size, 3 * config.image_size + 1, (len(images),))
    return images, list(config.images.captions()), sides


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as 3 x height x width in -1..1."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).float() / 127.5 - 1


def fit_vae(config: TinyTeacher, images: Tensor, run: Run) -> AutoencoderKL:
    """Train the autoencoder; its scaling factor makes the latents' standard deviation 1, as SDXL's does.

    images: N x 3 x side x side in -1..1.
    """
    vae = build_vae(config).to(memory_format=torch.channels_last)
    _narrow_posterior(vae)
    step = _stepper(list(vae.parameters()), config.vae)
    logged = run.last_step("vae_loss")
    side = config.image_size // 2 ** (len(config.vae_channels) - 1)

    def loss_of(model: AutoencoderKL, batch: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        posterior = model.encode(batch).latent_dist
        reconstruction = F.mse_loss(model.decode(posterior.mean + posterior.std * noise).sample, batch)
        return reconstruction + KL_WEIGHT * posterior.kl().mean(), reconstruction

    with Halves(vae) as halves:
        for index in progress(range(config.vae.steps), "teacher: VAE"):
            batch = images[torch.randint(len(images), (config.vae.batch_size,))]
            noise = torch.randn(len(batch), LATENT_CHANNELS, side, side)
            loss, reconstruction = halves.backward(loss_of, batch, noise)
            step(index)
            if index % 50 == 0 and index > logged:
                run.metrics({"vae_loss": loss, "vae_psnr": 10 * math.log10(4 / reconstruction)}, step=index)
    latents = encode(vae, images[:1024], scale=False)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae


def build_vae(config: TinyTeacher) -> AutoencoderKL:
    """Return an untrained autoencoder."""
    channels = config.vae_channels
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=config.image_size,
    )


@torch.no_grad()
def _narrow_posterior(vae: AutoencoderKL) -> None:
    """Start with a posterior of little noise, as a trained VAE's has. From a wide one, training takes thrice as long."""
    vae.quant_conv.weight[LATENT_CHANNELS:] = 0
    vae.quant_conv.bias[LATENT_CHANNELS:] = 2 * math.log(POSTERIOR_STD)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, scale: bool = True) -> Tensor:
    """Return latents N x 4 x h x w of images N x 3 x H x W, times the scaling factor unless `scale` is off."""
    latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in images.split(256)])
    return latents * vae.config.scaling_factor if scale else latents


def build_pipeline(config: TinyTeacher, vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    """Return an SDXL pipeline around `vae` with untrained text encoders and U-Net."""
    tokenizer = build_tokenizer(config)
    text = dict(
        config.text_config(),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text)),
        tokenizer=tokenizer,
        tokenizer_2=build_tokenizer(config),
        unet=UNet2DConditionModel(**config.unet_config()),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def build_tokenizer(config: TinyTeacher) -> CLIPTokenizer:
    """Return a CLIP tokenizer with a token for each word of `config.images.sentences()`; others are spelt in letters."""
    vocabulary, merges = byte_pairs(config.images.sentences())
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def fit_unet(
    config: TinyTeacher,
    pipeline: StableDiffusionXLPipeline,
    latents: Tensor,
    captions: list[str],
    sides: Tensor,
    run: Run,
) -> None:
    """Train the U-Net and both text encoders to predict the noise, and leave the EMA of the weights in them.

    latents: N x 4 x h x w, scaled; sides: N, passed to the U-Net as the images' original size, in pixels.
    """
    # The pipeline's scheduler samples; its noise is not scaled as training's is.
    unet, scheduler = pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config)
    tokens = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    model = nn.ModuleList([unet, pipeline.text_encoder, pipeline.text_encoder_2])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    average = EMAModel(parameters, decay=config.ema_decay, foreach=True)
    step = _stepper(parameters, config.unet)
    steps_of_noise = scheduler.config.num_train_timesteps
    logged = run.last_step("unet_loss")

    def loss_of(
        model: nn.ModuleList, clean: Tensor, noise: Tensor, timesteps: Tensor, ids: Tensor, keep: Tensor, side: Tensor
    ) -> tuple[Tensor]:
        states, pooled = _encode_text(model[1], model[2], ids)
        zero, target = torch.zeros_like(side), torch.full_like(side, config.image_size)
        predicted = model[0](
            scheduler.add_noise(clean, noise, timesteps),
            timesteps,
            encoder_hidden_states=states * keep[:, None, None],
            added_cond_kwargs={
                "text_embeds": pooled * keep[:, None],
                "time_ids": torch.stack([side, side, zero, zero, target, target], dim=1),
            },
        ).sample
        return (F.mse_loss(predicted, noise),)

    with Halves(model) as halves:
        for index in progress(range(config.unet.steps), "teacher: U-Net"):
            rows = torch.randint(len(latents), (config.unet.batch_size,))
            noise = torch.randn_like(latents[rows])
            timesteps = torch.randint(steps_of_noise, (len(rows),))
            keep = (torch.rand(len(rows)) >= config.caption_dropout).float()
            (loss,) = halves.backward(loss_of, latents[rows], noise, timesteps, tokens[rows], keep, sides[rows])
            step(index)
            average.step(parameters)
            if index % 50 == 0 and index > logged:
                run.metrics({"unet_loss": loss}, step=index)
    average.copy_to(parameters)


def _encode_text(one: nn.Module, other: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return SDXL's conditioning of token ids B x T: penultimate states of both encoders B x T x 2W, pooled of the second B x W."""
    first = one(tokens, output_hidden_states=True)
    second = other(tokens, output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


class Halves:
    """A model and its twin, which has the same weights: each takes half of a batch, in a thread of its own.

    With models as small as these, two threads of one core each are faster than operations that two cores share.
    """

    def __init__(self, model: nn.Module) -> None:
        """Make the twin of `model`."""
        self._models = (model, copy.deepcopy(model))
        self._pairs = list(zip(*(each.parameters() for each in self._models), strict=True))
        for own, twin in self._pairs:
            twin.data = own.data
        self._threads = ThreadPoolExecutor(len(self._models))

    def __enter__(self) -> "Halves":
        """Return the halves."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the threads."""
        self._threads.shutdown()

    def backward(self, loss_of: Callable[..., tuple[Tensor, ...]], *batch: Tensor) -> list[float]:
        """Add the gradients of a loss to the model's, and return the loss and whatever else `loss_of` returns.

        loss_of: gives means over a batch, the loss first, of a model and the batch's tensors. It draws nothing at random.
        """
        halves = list(zip(*(tensor.chunk(len(self._models)) for tensor in batch), strict=True))
        shares = [len(half[0]) / len(batch[0]) for half in halves]
        found = list(self._threads.map(partial(_backward, loss_of), self._models, halves, shares))
        for own, twin in self._pairs:
            if own.grad is not None and twin.grad is not None:
                own.grad.add_(twin.grad)
            twin.grad = None
        return [sum(values) for values in zip(*found, strict=True)]


def _backward(
    loss_of: Callable[..., tuple[Tensor, ...]], model: nn.Module, half: Sequence[Tensor], share: float
) -> list[float]:
    """Add the gradients of a half's share of the loss, and return its share of what `loss_of` returns."""
    found = [value * share for value in loss_of(model, *half)]
    found[0].backward()
    return [value.item() for value in found]


def _stepper(parameters: list[nn.Parameter], config: FitConfig) -> Callable[[int], None]:
    """Return an optimizer step, which clears gradients: AdamW, a short warm-up, cosine to zero, gradient norm at most 1."""
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.01, fused=True)
    warmup = max(config.steps // 20, 1)

    def step(index: int) -> None:
        rate = min((index + 1) / warmup, 0.5 * (1 + math.cos(math.pi * index / config.steps)))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
