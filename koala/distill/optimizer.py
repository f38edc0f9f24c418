"""The optimizer and its learning rate."""

import importlib.util
import math
from collections.abc import Sequence

import torch
from torch import nn

from koala.distill.config import DistillConfig
from koala.errors import KoalaError


def build_optimizer(config: DistillConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Return AdamW, fused into one kernel, or with 8-bit states. Raises KoalaError where bitsandbytes is missing."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay, fused=True)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise KoalaError(
            "distill.optimizer adamw-8bit needs bitsandbytes: `pip install bitsandbytes`, or set it to adamw"
        )
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, config.learning_rate, weight_decay=config.weight_decay)
    return optimizer


def learning_rate(config: DistillConfig, step: int) -> float:
    """Return the learning rate of step `step` (from 0): a linear warm-up, then constant or a cosine to zero."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    share = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
