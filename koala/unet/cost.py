"""The cost of a U-Net, stage by stage: parameters, FLOPs, self-attention layers.

    cost = unet_cost(SDXL, latent_size=128)
    cost.parameters, cost.flops, cost.stages["UP1"].self_attentions

All is counted on meta tensors, in seconds: no weights are read or downloaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from koala.unet.blocks import StudentRule, keep, teacher_stages
from koala.unet.reference import TEXT_TOKENS
from koala.unet.student import empty_unet, student_config
from koala.unet.weights import check, weight_map

OTHER = "other"
"""The part that belongs to no stage: the first and last convolution, the embeddings of time, size and crop."""


@dataclass(frozen=True)
class StageCost:
    """The cost of one stage."""

    parameters: int
    flops: int
    """Of one forward pass of one image; a multiply-add counts as 2."""
    self_attentions: int
    """Layers."""


@dataclass(frozen=True)
class UNetCost:
    """The cost of each stage, in the order of the forward pass, and of what lies outside the stages (`other`, last)."""

    stages: dict[str, StageCost]

    @property
    def parameters(self) -> int:
        """Parameters of all stages."""
        return sum(stage.parameters for stage in self.stages.values())

    @property
    def flops(self) -> int:
        """FLOPs of one forward pass of one image."""
        return sum(stage.flops for stage in self.stages.values())

    @property
    def self_attentions(self) -> int:
        """Self-attention layers."""
        return sum(stage.self_attentions for stage in self.stages.values())


def unet_cost(unet_config: Mapping[str, Any], latent_size: int) -> UNetCost:
    """Count a U-Net of this UNet2DConditionModel configuration, for square latents of `latent_size` x `latent_size`.

    Raises KoalaError for a U-Net that is not of SDXL's shape.
    """
    unet = empty_unet(unet_config)
    flops = _forward_flops(unet, latent_size)
    stages = {}
    for stage in teacher_stages(unet.config):
        parameters = unet.get_submodule(stage.path).parameters()
        stages[stage.name] = StageCost(
            sum(tensor.numel() for tensor in parameters), flops.get(stage.path, 0), sum(stage.depths)
        )
    stages[OTHER] = StageCost(
        unet.num_parameters() - sum(stage.parameters for stage in stages.values()),
        flops[""] - sum(stage.flops for stage in stages.values()),
        0,
    )
    return UNetCost(stages)


def _forward_flops(unet: UNet2DConditionModel, latent_size: int) -> dict[str, int]:
    """Count FLOPs of one forward pass by module path, from the shapes; "" is the whole U-Net."""
    config: Any = unet.config
    latents = torch.empty(1, config.in_channels, latent_size, latent_size, device="meta")
    text = torch.empty(1, TEXT_TOKENS, config.cross_attention_dim, device="meta")
    conditions = {}
    if config.addition_embed_type == "text_time":
        # The pooled text embedding is what the projection takes besides the six numbers of sizes and crop.
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        conditions = {
            "text_embeds": torch.empty(1, pooled, device="meta"),
            "time_ids": torch.empty(1, 6, device="meta"),
        }
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(latents, torch.empty(1, device="meta"), text, added_cond_kwargs=conditions)
    root = type(unet).__name__
    return {
        name.removeprefix(root).removeprefix("."): sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
        if name.startswith(root)
    }


def student_cost(teacher_config: Mapping[str, Any], rule: StudentRule, latent_size: int) -> UNetCost:
    """Count the student that a rule makes of a teacher. Raises KoalaError for a rule that does not fit it."""
    stages = keep(teacher_config, rule)
    config = student_config(teacher_config, stages)
    shapes = empty_unet(config).state_dict()
    check(weight_map(stages, shapes), shapes, empty_unet(teacher_config).state_dict())
    return unet_cost(config, latent_size)
