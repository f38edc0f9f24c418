"""SDXL's U-Net and its known students, as data: what `koala inspect` and the benchmark compare with."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from koala.unet.blocks import StudentRule

# SDXL 1.0 (Base, Turbo, Lightning): what a rule reads, and what else differs from UNet2DConditionModel's defaults.
SDXL: Mapping[str, Any] = MappingProxyType(
    {
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "reverse_transformer_layers_per_block": None,
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
)

VAE_FACTOR = 8  # pixels of the image for a pixel of SDXL's latents, a side
TEXT_TOKENS = 77

# BK-Base: the rule of BK-SDM (arXiv 2305.15798), which KOALA starts from. SSD-1B and Vega: Segmind (arXiv 2401.02677).
RULES: Mapping[str, StudentRule] = MappingProxyType(
    {
        "sdxl": StudentRule(down_pairs=(0, 1), up_pairs=(0, 1, 2), mid="keep"),
        "bk-base": StudentRule(down_pairs=(0,), up_pairs=(0, 2), mid="keep"),
        "ssd-1b": StudentRule(
            down_pairs=(0, 1),
            up_pairs=(0, 1, 2),
            mid="resnets",
            depth={"DW3": 4, "UP1": (4, 4, 10), "UP2": (2, 1, 1)},
        ),
        "vega": StudentRule(
            down_pairs=(0, 1),
            up_pairs=(0, 1, 2),
            mid="resnets",
            depth={"DW2": 1, "DW3": 2, "UP1": 2, "UP2": 1},
        ),
    }
)
