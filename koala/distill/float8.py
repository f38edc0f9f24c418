"""Float8 linear layers for the teacher's transformer layers: half their memory, and a GPU's highest rate.

Weights are scaled by output channel when a layer is converted, inputs by token in each call. Norms, attention, convolutions
and the layers' outputs stay in bfloat16. GPUs multiply float8 from compute capability 8.9 (Ada, Hopper). A CPU computes the
same products, slowly. docs/decisions says why this is not torchao.
"""

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from koala.errors import KoalaError

CAPABILITY = (8, 9)
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_SMALLEST_ROW = 1e-12  # a row of zeros, as of the states of a dropped caption, must not be divided by 0
_ALIGNMENT = 16  # of both sides of a weight matrix, as GPUs require


class Float8Linear(nn.Module):
    """A frozen linear layer that multiplies in float8 (e4m3): B x ... x in to B x ... x out, bfloat16."""

    def __init__(self, linear: nn.Linear) -> None:
        """Quantize the layer's weight. The bias is shared with `linear`."""
        super().__init__()
        weight, scale = _quantize(linear.weight.detach())
        # Stored as bytes: DDP broadcasts every parameter, and gloo cannot send float8.
        self.weight = nn.Parameter(weight.view(torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(scale.t().contiguous(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Quantize `x` by token and multiply."""
        rows, scale = _quantize(x.flatten(0, -2))
        out: Tensor = F.scaled_mm(
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


def _quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows N x K as float8 that fill its range, and the factor that restores each: N x 1, float32."""
    scale = rows.abs().amax(-1, keepdim=True).float().clamp(min=_SMALLEST_ROW) / _LARGEST
    return (rows.float() / scale).to(torch.float8_e4m3fn), scale


def convert(teacher: UNet2DConditionModel) -> None:
    """Replace the linear layers of a frozen bfloat16 U-Net's transformer layers, in place."""
    for block in teacher.modules():
        if type(block).__name__ != "BasicTransformerBlock":
            continue
        for path, linear in list(block.named_modules()):
            if isinstance(linear, nn.Linear) and not any(side % _ALIGNMENT for side in linear.weight.shape):
                parent, _, name = path.rpartition(".")
                setattr(block.get_submodule(parent), name, Float8Linear(linear))


def possible(device: torch.device) -> bool:
    """Return whether the device multiplies float8."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= CAPABILITY


def check(device: torch.device) -> None:
    """Raise KoalaError for a GPU that does not multiply float8."""
    if not possible(device):
        raise KoalaError(
            f"distill.teacher_float8 needs a GPU of compute capability {'.'.join(map(str, CAPABILITY))} or more "
            f"(Ada, Hopper); {torch.cuda.get_device_name(device)} is older: set it to false"
        )
