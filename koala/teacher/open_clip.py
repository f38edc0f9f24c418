"""open_clip's layout of CLIP: the name and the form that each tensor of a tower has in its files."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["same", "transposed", "convolution", "q", "k", "v"]


@dataclass(frozen=True)
class Place:
    """Where a tensor of a pipeline stands in a file of another layout, and in which form.

    transposed: a matrix. convolution: a matrix as a 1x1 convolution (four dimensions). q, k, v: the first, second or
    last third of the rows of a fused tensor.
    """

    name: str
    form: Form = "same"

    def write(self, tensor: "Tensor") -> "Tensor":
        """Return the pipeline's tensor in the file's form; of a fused tensor, this third."""
        if self.form == "transposed":
            return tensor.T
        if self.form == "convolution" and tensor.ndim == 2:
            return tensor[:, :, None, None]
        return tensor

    def read(self, tensor: "Tensor") -> "Tensor":
        """Return the file's tensor in the pipeline's form."""
        if self.form == "transposed":
            return tensor.T
        if self.form == "convolution" and tensor.ndim == 4:
            return tensor[:, :, 0, 0]
        if self.form in THIRDS:
            return tensor.chunk(3)[THIRDS.index(self.form)]
        return tensor


THIRDS = ("q", "k", "v")
"""Order of the thirds of a fused tensor."""


Outside = Mapping[str, tuple[str, Form]]
"""Tensors outside the layers of a CLIP tower: transformers' name -> open_clip's, and its form."""

OPEN_CLIP_TEXT: Outside = {
    "embeddings.position_embedding.weight": ("positional_embedding", "same"),
    "embeddings.token_embedding.weight": ("token_embedding.weight", "same"),
    "final_layer_norm.weight": ("ln_final.weight", "same"),
    "final_layer_norm.bias": ("ln_final.bias", "same"),
    "text_projection.weight": ("text_projection", "transposed"),
}
_OPEN_CLIP_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def open_clip(name: str, prefix: str, outside: Outside) -> Place:
    """Return the place of a tensor of a CLIP tower under open_clip's names, which hold q, k and v in one tensor.

    name: transformers' name within the tower. Raises KeyError for a name that no tower has.
    """
    if name in outside:
        return Place(prefix + outside[name][0], outside[name][1])
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        raise KeyError(name)
    block = f"{prefix}transformer.resblocks.{match[1]}"
    third = re.fullmatch(r"self_attn\.([qkv])_proj", match[2])
    if third:
        return Place(f"{block}.attn.in_proj_{match[3]}", third[1])  # type: ignore[arg-type]
    return Place(f"{block}.{_OPEN_CLIP_LAYER[match[2]]}.{match[3]}")
