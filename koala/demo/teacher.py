"""Trains the demo's teacher: a VAE, two CLIP text encoders and a U-Net of SDXL's own classes, on drawn pictures.

Two parts, each with its file of finished work in the resume folder, so that a run that was stopped goes on with the
part that it was in: the VAE (L2 and a little KL), then text encoders and U-Net together (epsilon prediction).
"""

import math
import string
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

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
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from koala.console import hide_loading_bars, progress
from koala.demo import shapes
from koala.demo.config import LATENT_CHANNELS, TOKENS, FitConfig, TinyTeacherConfig
from koala.work import resume_folder

if TYPE_CHECKING:
    from koala.tracking import StageRun

POSTERIOR_STD = 0.2  # at the start, of latents whose own is about 1
KL_WEIGHT = 1e-5


def train(config: TinyTeacherConfig, run: "StageRun") -> Path:
    """Train the teacher and save it; gives the pipeline folder, in the resume folder."""
    work = resume_folder("teacher", config=config.model_dump())
    folder = work / "pipeline"
    if folder.is_dir():
        return folder
    hide_loading_bars()
    torch.manual_seed(config.seed)
    pictures, captions, sides = _pictures(config)
    vae = _once(work / "vae", AutoencoderKL, lambda: fit_vae(config, pictures, run))
    pipeline = build_pipeline(config, vae)
    fit_unet(config, pipeline, encode(vae, pictures), captions, sides, run)
    partial = work / "pipeline.partial"
    pipeline.save_pretrained(partial, safe_serialization=True)
    partial.rename(folder)
    return folder


def _once(folder: Path, kind: type[AutoencoderKL], make: Callable[[], AutoencoderKL]) -> AutoencoderKL:
    """Load a model that an earlier run finished, or make and keep it."""
    if not folder.is_dir():
        partial = folder.with_suffix(".partial")
        make().save_pretrained(partial, safe_serialization=True)
        partial.rename(folder)
    return kind.from_pretrained(folder, use_safetensors=True)


def _pictures(config: TinyTeacherConfig) -> tuple[Tensor, list[str], Tensor]:
    """Drawn pictures N x 3 x side x side in -1..1, their captions, and sides (px) to tell as their original size: N."""
    scenes = [shapes.sample_scene(config.seed, index) for index in range(config.pictures)]
    captions = [shapes.caption(scene, config.seed, index) for index, scene in enumerate(scenes)]
    pictures = torch.stack([to_tensor(shapes.draw(scene, config.image_size)) for scene in scenes])
    sides = torch.randint(config.image_size, 3 * config.image_size + 1, (config.pictures,))
    return pictures, captions, sides


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as 3 x height x width in -1..1."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).float() / 127.5 - 1


def fit_vae(config: TinyTeacherConfig, pictures: Tensor, run: "StageRun") -> AutoencoderKL:
    """Train the autoencoder; its scaling factor makes the latents' standard deviation 1, as SDXL's does."""
    vae = build_vae(config).to(memory_format=torch.channels_last)
    _narrow_posterior(vae)
    parameters = list(vae.parameters())
    step = _stepper(parameters, config.vae)
    for index in progress(range(config.vae.steps), "teacher: VAE"):
        batch = pictures[torch.randint(len(pictures), (config.vae.batch_size,))]
        posterior = vae.encode(batch).latent_dist
        reconstruction = F.mse_loss(vae.decode(posterior.sample()).sample, batch)
        loss = reconstruction + KL_WEIGHT * posterior.kl().mean()
        step(loss, index)
        if index % 50 == 0:
            psnr = 10 * math.log10(4 / reconstruction.item())
            run.metrics({"vae_loss": loss.item(), "vae_psnr": psnr}, step=index)
    latents = encode(vae, pictures[:1024], scale=False)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae


def build_vae(config: TinyTeacherConfig) -> AutoencoderKL:
    """A fresh autoencoder."""
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
    """Start with a posterior of little noise, as a trained VAE's has: from a wide one, training takes thrice as long."""
    vae.quant_conv.weight[LATENT_CHANNELS:] = 0
    vae.quant_conv.bias[LATENT_CHANNELS:] = 2 * math.log(POSTERIOR_STD)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, scale: bool = True) -> Tensor:
    """Latents N x 4 x h x w of pictures N x 3 x H x W, times the scaling factor unless `scale` is off."""
    latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in pictures.split(256)])
    return latents * vae.config.scaling_factor if scale else latents


def build_pipeline(config: TinyTeacherConfig, vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    """An SDXL pipeline around `vae` with fresh text encoders and U-Net."""
    tokenizer = build_tokenizer()
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=config.text_width,
        intermediate_size=2 * config.text_width,
        projection_dim=config.text_width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text)),
        tokenizer=tokenizer,
        tokenizer_2=build_tokenizer(),
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


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in whose vocabulary every word of the captions is one token; others are spelt in letters."""
    sentences = (
        shapes.describe(attributes, phrase) for attributes in shapes.ALL_ATTRIBUTES for phrase in shapes.PHRASES
    )
    words = sorted({word for sentence in sentences for word in sentence.split()})
    tokens = ["<|startoftext|>", "<|endoftext|>"]
    tokens += [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    merges = []
    for word in words:
        # From the end of the word: a pair that ends a word can only be met where that word ends.
        suffix = word[-1] + "</w>"
        for letter in reversed(word[:-1]):
            merges.append((letter, suffix))
            suffix = letter + suffix
            tokens.append(suffix)
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=list(dict.fromkeys(merges)), model_max_length=TOKENS)


def fit_unet(
    config: TinyTeacherConfig,
    pipeline: StableDiffusionXLPipeline,
    latents: Tensor,
    captions: list[str],
    sides: Tensor,
    run: "StageRun",
) -> None:
    """Train the U-Net and both text encoders to predict the noise; leaves the moving average of the weights in them.

    latents: N x 4 x h x w, scaled; sides: N, told to the U-Net as the pictures' original size.
    """
    # The pipeline's scheduler samples; its noise is not scaled as training's is.
    unet, scheduler = pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config)
    tokens = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    model = nn.ModuleList([unet, pipeline.text_encoder, pipeline.text_encoder_2])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    average = EMAModel(parameters, decay=config.ema_decay, foreach=True)
    step = _stepper(parameters, config.unet)
    steps_of_noise = scheduler.config.num_train_timesteps
    target_side = torch.full((config.unet.batch_size,), config.image_size)
    for index in progress(range(config.unet.steps), "teacher: U-Net"):
        rows = torch.randint(len(latents), (config.unet.batch_size,))
        noise = torch.randn_like(latents[rows])
        timesteps = torch.randint(steps_of_noise, (len(rows),))
        states, pooled = _encode_text(pipeline, tokens[rows])
        keep = (torch.rand(len(rows)) >= config.caption_dropout).float()
        side = sides[rows]
        zero = torch.zeros_like(side)
        time_ids = torch.stack([side, side, zero, zero, target_side, target_side], dim=1)
        predicted = unet(
            scheduler.add_noise(latents[rows], noise, timesteps),
            timesteps,
            encoder_hidden_states=states * keep[:, None, None],
            added_cond_kwargs={"text_embeds": pooled * keep[:, None], "time_ids": time_ids},
        ).sample
        loss = F.mse_loss(predicted, noise)
        step(loss, index)
        average.step(parameters)
        if index % 50 == 0:
            run.metrics({"unet_loss": loss.item()}, step=index)
    average.copy_to(parameters)


def _encode_text(pipeline: StableDiffusionXLPipeline, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """SDXL's conditioning of token ids B x T: penultimate states of both encoders B x T x 2W, pooled of the second B x W."""
    first = pipeline.text_encoder(tokens, output_hidden_states=True)
    second = pipeline.text_encoder_2(tokens, output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def _stepper(parameters: list[nn.Parameter], config: FitConfig) -> Callable[[Tensor, int], None]:
    """One optimiser step: AdamW, a short warm-up, cosine to zero, gradient norm at most 1."""
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.01, fused=True)
    warmup = max(config.steps // 20, 1)

    def step(loss: Tensor, index: int) -> None:
        rate = min((index + 1) / warmup, 0.5 * (1 + math.cos(math.pi * index / config.steps)))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step
