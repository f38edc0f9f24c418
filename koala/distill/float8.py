"""The teacher's transformer layers with their products in float8: half their memory, and a GPU's highest rate.

Weights are scaled by output channel when they are turned, inputs by token as they come; norms, attention, convolutions and
what the product gives stay in bfloat16. GPUs have it from compute capability 8.9 (Ada, Hopper); a CPU computes the same.
"""

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from koala.errors import KoalaError

CAPABILITY = (8, 9)
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_ALIGNMENT = 16  # of a product's inner and outer side, as GPUs ask


class Float8Linear(nn.Module):
    """A frozen linear layer, x B x ... x in to B x ... x out in bfloat16, that multiplies in float8 (e4m3)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = _scaled(linear.weight.detach())
        # As bytes, which every backend of distributed training can send.
        self.weight = nn.Parameter(weight.view(torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(scale.t().contiguous(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = _scaled(x.flatten(0, -2))
        out = F.scaled_mm(
            rows,
            self.weight.view(torch.float8_e4m3fn).t(),
            scale,
            ScalingType.RowWise,
            self.scale,
            ScalingType.RowWise,
            output_dtype=torch.bfloat16,
        )
        out = out.unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias


def _scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows N x K as float8 that fill its range, and what they are to be multiplied by: N x 1, float32."""
    scale = rows.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / _LARGEST
    return (rows.float() / scale).to(torch.float8_e4m3fn), scale


def convert(teacher: UNet2DConditionModel) -> None:
    """Turn the linear layers of a frozen U-Net's transformer layers, in place. The U-Net is in bfloat16 already."""
    for block in teacher.modules():
        if type(block).__name__ != "BasicTransformerBlock":
            continue
        for path, linear in list(block.named_modules()):
            if isinstance(linear, nn.Linear) and not any(side % _ALIGNMENT for side in linear.weight.shape):
                parent, _, name = path.rpartition(".")
                setattr(block.get_submodule(parent), name, Float8Linear(linear))


def possible(device: torch.device) -> bool:
    """Whether the device multiplies float8."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= CAPABILITY


def check(device: torch.device) -> None:
    """Raises KoalaError for a GPU that does not multiply float8."""
    if not possible(device):
        raise KoalaError(
            f"distill.teacher_float8 needs a GPU of compute capability {'.'.join(map(str, CAPABILITY))} or more "
            f"(Ada, Hopper); {torch.cuda.get_device_name(device)} is older: set it to false"
        )
