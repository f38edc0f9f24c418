"""Small pipelines of SDXL's shape in the sizes that front ends fix: 32 norm groups, so widths of 32, 64 and 128."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from koala.demo.images import Shapes
from koala.teacher.config import FitConfig, TinyTeacher
from koala.teacher.tiny import build_tokenizer
from koala.unet.blocks import StudentRule
from koala.unet.reference import RULES, SDXL

ROWS = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())["students"]
STUDENTS = {
    **{name: StudentRule(**row["unet"]) for name, row in ROWS.items()},
    **RULES,
    "700m-with-mid": StudentRule(down_pairs=(0,), up_pairs=(0, 2), mid="keep", depth={"DW3": 5, "Mid": 5, "UP1": 5}),
    "resnets-in-mid": StudentRule(down_pairs=(0,), up_pairs=(0, 2), mid="resnets"),
}
SMALL = {"block_out_channels": (32, 64, 128), "attention_head_dim": (1, 2, 4), "cross_attention_dim": 64 + 96}
SMALL |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 96, "sample_size": 8}


def randomised(model: Any, seed: int) -> Any:
    """The model with a different value in every place: fresh norms and biases would hide an exchange."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.02)
    return model.eval()


@cache
def small_pipeline() -> StableDiffusionXLPipeline:
    fit = FitConfig(steps=1, batch_size=1, learning_rate=1e-3)
    tiny = TinyTeacher(images=Shapes(count=1), text_width=64, vae=fit, unet=fit)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    second = tiny.text_config() | {"hidden_size": 96, "intermediate_size": 96, "projection_dim": 96}
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 128),
        layers_per_block=2,
        sample_size=32,
    )
    return StableDiffusionXLPipeline(
        vae=randomised(vae, 1),
        text_encoder=randomised(CLIPTextModel(CLIPTextConfig(**tiny.text_config(), **ids)), 2),
        text_encoder_2=randomised(CLIPTextModelWithProjection(CLIPTextConfig(**second, **ids)), 3),
        tokenizer=build_tokenizer(tiny),
        tokenizer_2=build_tokenizer(tiny),
        unet=randomised(UNet2DConditionModel(**{**SDXL, **SMALL}), 4),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
        ),
        add_watermarker=False,
    )
