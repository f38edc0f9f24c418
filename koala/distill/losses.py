"""The terms of the objective: pure functions, means in fp32."""

import torch
from torch import Tensor


def mse(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean squared error of two tensors B x ..., in fp32; `weight` (B) weighs each sample's mean."""
    squares = (a.float() - b.float()).square()
    if weight is None:
        return squares.mean()
    return (squares.flatten(1).mean(1) * weight).mean()


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Return each sample's loss weight B from its signal-to-noise ratio B (Hang et al. 2023, Min-SNR).

    It is min(snr, gamma) / snr for a network that predicts the noise, and over snr + 1 for one that predicts v.
    """
    clipped = snr.clamp(max=gamma)
    return clipped / (snr + 1) if prediction_type == "v_prediction" else clipped / snr


def snr(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Return the signal-to-noise ratio B at `timesteps` B: alpha_bar / (1 - alpha_bar)."""
    alpha = alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alpha / (1 - alpha)


def total(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Return the weighted sum of named terms, `feature/DW2` by the weight `feature` (KOALA: L_task + L_outKD + sum L_featKD)."""
    return torch.stack([weights[name.partition("/")[0]] * term for name, term in terms.items()]).sum()
