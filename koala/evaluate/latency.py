"""How long a U-Net takes for one step."""

import statistics
import time
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel


@torch.no_grad()
def step_latency(unets: dict[str, UNet2DConditionModel], tokens: int, batch: int, repeats: int) -> dict[str, float]:
    """Median seconds of a forward pass of each U-Net, on its device and in its type, random input of its own sample size.

    The U-Nets take turns, so that a machine whose speed drifts does not favour one. tokens: length of the text states.
    """
    runs = {name: _runner(unet, tokens, batch) for name, unet in unets.items()}
    times: dict[str, list[float]] = {name: [] for name in unets}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _runner(unet: UNet2DConditionModel, tokens: int, batch: int) -> Callable[[], None]:
    random = torch.Generator().manual_seed(0)
    config, options = unet.config, {"device": unet.device, "dtype": unet.dtype}
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    latents = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, generator=random)
    states = torch.randn(batch, tokens, config.cross_attention_dim, generator=random)
    added = {
        "text_embeds": torch.randn(batch, pooled, generator=random).to(**options),
        "time_ids": torch.zeros(batch, 6),
    }
    added["time_ids"] = added["time_ids"].to(**options)
    latents, states = latents.to(**options), states.to(**options)

    def run() -> None:
        unet(latents, 500, encoder_hidden_states=states, added_cond_kwargs=added)
        if unet.device.type == "cuda":
            torch.cuda.synchronize()

    return run
