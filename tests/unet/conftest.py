"""The rules of params.yaml, and a U-Net of SDXL's shape small enough to hold."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from koala.unet.blocks import StudentRule
from koala.unet.reference import RULES, SDXL

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def rules() -> dict[str, StudentRule]:
    """The rules of params.yaml and those of the known students."""
    students = yaml.safe_load((ROOT / "params.yaml").read_text())["students"]
    return {name: StudentRule(**row["unet"]) for name, row in students.items()} | dict(RULES)


@pytest.fixture(scope="session")
def tiny_config() -> dict[str, Any]:
    """SDXL's configuration with few channels and layers."""
    return dict(SDXL) | {
        "sample_size": 8,
        "block_out_channels": (32, 64, 96),
        "transformer_layers_per_block": (1, 1, 3),
        "attention_head_dim": (2, 2, 4),
        "cross_attention_dim": 32,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    }


@pytest.fixture
def teacher(tiny_config: dict[str, Any]) -> UNet2DConditionModel:
    """A tiny U-Net, every tensor of it random, so that no two are alike."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(tiny_config).eval()
    with torch.no_grad():
        for tensor in unet.parameters():
            tensor.normal_(std=0.1)
    return unet


@pytest.fixture(scope="session")
def inputs() -> dict[str, Any]:
    """What a tiny U-Net takes: a batch of two."""
    random = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=random),
        "timestep": torch.tensor([10, 900]),
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=random),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(2, 32, generator=random),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(2, 1),
        },
    }
