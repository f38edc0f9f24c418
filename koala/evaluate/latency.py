"""Latency of a U-Net's step."""

import statistics
import time
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel


@torch.no_grad()
def step_latency(unet: UNet2DConditionModel, tokens: int, batch: int, repeats: int) -> float:
    """Return the median seconds of a U-Net's forward pass, on its device, in its type, at its own sample size.

    Args:
        unet: The U-Net.
        tokens: Length of the text states.
        batch: Latents in a pass.
        repeats: Timed passes, after a warm-up.
    """
    forward = _forward(unet, tokens, batch)
    forward()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        forward()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _forward(unet: UNet2DConditionModel, tokens: int, batch: int) -> Callable[[], None]:
    """Return a function that runs a forward pass on random input and waits for it."""
    random = torch.Generator().manual_seed(0)
    config, options = unet.config, {"device": unet.device, "dtype": unet.dtype}
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    latents = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, generator=random)
    states = torch.randn(batch, tokens, config.cross_attention_dim, generator=random)
    added = {
        "text_embeds": torch.randn(batch, pooled, generator=random).to(**options),
        "time_ids": torch.zeros(batch, 6).to(**options),
    }
    latents, states = latents.to(**options), states.to(**options)

    def forward() -> None:
        unet(latents, 500, encoder_hidden_states=states, added_cond_kwargs=added)
        if unet.device.type == "cuda":
            torch.cuda.synchronize()

    return forward
