"""CLIP models in open_clip's layout, as transformers' class."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from koala.pretrained import WrongModelError
from koala.teacher.open_clip import OPEN_CLIP_TEXT, Outside, Place, open_clip

if TYPE_CHECKING:
    from torch import Tensor

_VISION: Outside = {
    "embeddings.class_embedding": ("class_embedding", "same"),
    "embeddings.patch_embedding.weight": ("conv1.weight", "same"),
    "embeddings.position_embedding.weight": ("positional_embedding", "same"),
    "pre_layrnorm.weight": ("ln_pre.weight", "same"),
    "pre_layrnorm.bias": ("ln_pre.bias", "same"),
    "post_layernorm.weight": ("ln_post.weight", "same"),
    "post_layernorm.bias": ("ln_post.bias", "same"),
    "visual_projection.weight": ("proj", "transposed"),
}


def from_open_clip(tensors: "Mapping[str, Tensor]", names: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Return the tensors of an open_clip model under the names of transformers' `CLIPModel`.

    Args:
        tensors: open_clip's, by name; or those of a module that holds the model as `model`.
        names: The tensors of a `CLIPModel` of the same size, of which only the names and the shapes are looked at.

    Raises:
        WrongModelError: A tensor is missing, has another shape, or has no place in the model.
    """
    prefix = "model." if "model.logit_scale" in tensors else ""
    places = {name: _place(name, prefix) for name in names}
    if different := {place.name for place in places.values()} ^ tensors.keys():
        raise WrongModelError(f"{len(different)} tensors are missing or unknown, {min(different)} among them")
    found = {name: place.read(tensors[place.name]).contiguous() for name, place in places.items()}
    if wrong := [name for name in names if found[name].shape != names[name].shape]:
        raise WrongModelError(f"{places[wrong[0]].name} has the shape {tuple(tensors[places[wrong[0]].name].shape)}")
    return found


def _place(name: str, prefix: str) -> Place:
    if name == "logit_scale":
        return Place(prefix + name)
    if name.startswith("vision_model.") or name in _VISION:
        return open_clip(name.removeprefix("vision_model."), f"{prefix}visual.", _VISION)
    return open_clip(name.removeprefix("text_model."), prefix, OPEN_CLIP_TEXT)
