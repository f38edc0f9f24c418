"""Pipelines with random weights, of a teacher's shape: speed and memory do not depend on what was trained."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from koala.data.latents import write_shard
from koala.teacher.config import LATENT_CHANNELS, TeacherConfig, TinyTeacher
from koala.teacher.tiny import build_pipeline, build_vae
from koala.unet.reference import SDXL

# SDXL's other parts. Its VAE runs in half precision, as the one that is safe there does.
_CLIP_L: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_CLIP_G: Mapping[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_VAE: Mapping[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": LATENT_CHANNELS,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": False,
}


def random_tokens(text: CLIPTextConfig, captions: int) -> torch.Tensor:
    """Return token ids as both tokenizers give them for N captions: N x 2 x T."""
    return torch.randint(text.vocab_size, (captions, 2, text.max_position_embeddings))


def random_pipeline(teacher: TeacherConfig, device: torch.device, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """Return a pipeline shaped as the teacher will be; all but the tiny one count as SDXL."""
    if not isinstance(teacher, TinyTeacher):
        return random_sdxl(SDXL, device, dtype)
    with _made(device, dtype):
        return build_pipeline(teacher, build_vae(teacher))


def random_sdxl(unet: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """Return SDXL around a U-Net of this configuration, without tokenizers, whose vocabulary is not ours."""
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    with _made(device, dtype):
        return StableDiffusionXLPipeline(
            vae=AutoencoderKL(**_VAE),
            text_encoder=CLIPTextModel(CLIPTextConfig(**_CLIP_L)).eval(),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**_CLIP_G)).eval(),
            tokenizer=None,
            tokenizer_2=None,
            unet=UNet2DConditionModel.from_config(dict(unet)).eval(),
            scheduler=scheduler,
            add_watermarker=False,
        )


@contextmanager
def _made(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Build modules on `device` in `dtype` inside the block: a small card never holds them in float32."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(usual)


def random_latents(folder: Path, buckets: Mapping[tuple[int, int], int], factor: int) -> None:
    """Write random encoded samples to `folder`, as the stage `encode` does: N in each bucket (height, width, px).

    `factor` is the pixels of an image for a pixel of its latent, a side.
    """
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(0)
    rows: list[dict[str, object]] = []
    latents = {}
    for (height, width), count in buckets.items():
        name = f"00000-{height}x{width}.safetensors"
        latents[name] = list(torch.randn(count, LATENT_CHANNELS, height // factor, width // factor, generator=random))
        for row in range(count):
            rows.append(
                {
                    "key": f"{len(rows):09d}",
                    "caption": f"a large red circle on a {'white' if row % 2 else 'black'} background",
                    "file": name,
                    "row": row,
                    "bucket_height": height,
                    "bucket_width": width,
                    "original_height": 2 * height,
                    "original_width": 2 * width + row,
                    "crop_top": 0,
                    "crop_left": row % 3,
                    "flipped": False,
                }
            )
    write_shard(folder, "00000", rows, latents)
