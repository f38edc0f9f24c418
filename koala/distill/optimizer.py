"""The optimiser and its learning rate."""

import importlib.util
import math
from collections.abc import Sequence

import torch
from torch import nn

from koala.distill.config import DistillConfig
from koala.errors import KoalaError


def build_optimizer(recipe: DistillConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, fused into one kernel, or with moments of 8 bits. Raises KoalaError where bitsandbytes is missing."""
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise KoalaError(
            "distill.optimizer adamw-8bit needs bitsandbytes: `pip install bitsandbytes`, or set it to adamw"
        )
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay)


def learning_rate(recipe: DistillConfig, step: int) -> float:
    """The rate of step `step` (from 0): a linear warm-up, then constant or a cosine to zero."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    share = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
