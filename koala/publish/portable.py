"""A pipeline folder for others: weights in half precision, names of CLIP-L and vocabularies that any transformers reads.

transformers 5 saves CLIP-L without `text_model.` and a tokenizer as tokenizer.json alone. transformers 4 would initialise
such an encoder anew, with only a warning, and finds no vocabulary. Both read what this makes of it.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.errors import KoalaError
from koala.teacher.layout import MODEL_INDEX, MODELS, is_index
from koala.teacher.shape import read_json

if TYPE_CHECKING:
    from torch import Tensor, dtype

_PREFIX = "text_model."
_WEIGHTS = "model.safetensors"
_ORIGINS = ("_name_or_path", "name_or_path", "special_tokens_map_file")
"""Entries in which diffusers and transformers note a path."""


def make_portable(folder: Path) -> None:
    """Give CLIP-L its prefixed names, and each tokenizer its vocab.json and merges.txt, in a folder that may be changed.

    Configurations lose the paths of the machine that saved them.
    """
    for file in (folder / MODEL_INDEX, *folder.glob("*/*config.json")):
        _forget_origin(file)
    _prefix_clip_l(folder / "text_encoder")
    for tokenizer in (folder / "tokenizer", folder / "tokenizer_2"):
        if (tokenizer / "tokenizer.json").is_file():
            _split_tokenizer(tokenizer)


def store_as(folder: Path, dtype: str) -> None:
    """Store the weights of each model in `dtype`, in a folder that may be changed; whole numbers stay as they are.

    A shard is in memory at a time.

    Raises:
        KoalaError: A weight has a value that `dtype` cannot hold.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    kind = getattr(torch, dtype)
    for part in MODELS:
        for file in sorted((folder / part).glob("*.safetensors")):
            with safe_open(file, "pt") as content:
                metadata = content.metadata() or {"format": "pt"}
                tensors = {name: content.get_tensor(name) for name in list(content.keys())}
            unfinished = file.with_name(f".{file.name}.partial")
            save_file(
                {name: as_type(tensor, kind, f"{part}: {name}") for name, tensor in tensors.items()},
                unfinished,
                metadata,
            )
            os.replace(unfinished, file)
    for encoder in ("text_encoder", "text_encoder_2"):
        # transformers 5 loads in the dtype that stands here, or else in that of the weights; diffusers in float32, unless told
        # otherwise. A pipeline of both would not run.
        file = folder / encoder / "config.json"
        values = {name: value for name, value in read_json(file).items() if name != "torch_dtype"}
        file.write_text(json.dumps(values | {"dtype": "float32"}, indent=2) + "\n")


def as_type(tensor: "Tensor", kind: "dtype", name: str) -> "Tensor":
    """Return a tensor in a floating-point type; whole numbers stay. Raises KoalaError where it cannot hold a value."""
    if not tensor.is_floating_point():
        return tensor
    found = tensor.to(kind)
    if not found.isfinite().all():
        raise KoalaError(f"{name} has values that are not finite in {kind}: set publish.dtype to another")
    return found


def _forget_origin(file: Path) -> None:
    """Remove from a configuration where its model was loaded from, which no loader needs."""
    values = read_json(file)
    kept = {name: value for name, value in values.items() if name not in _ORIGINS}
    if kept != values:
        file.write_text(json.dumps(kept, indent=2) + "\n")


def _prefix_clip_l(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Any] = {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        tensors |= load_file(file)
    if all(name.startswith(_PREFIX) for name in tensors):
        return
    tensors = {_PREFIX + name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    unfinished = folder / f".{_WEIGHTS}.partial"
    save_file(tensors, unfinished, {"format": "pt"})  # transformers asks for the format
    for old in [*files, *(file for file in folder.iterdir() if is_index(file.name))]:
        old.unlink()
    os.replace(unfinished, folder / _WEIGHTS)


def _split_tokenizer(folder: Path) -> None:
    """Write the vocabulary and merges in tokenizer.json as the files that transformers 4 reads, where they are missing."""
    model = read_json(folder / "tokenizer.json")["model"]
    if not (folder / "vocab.json").exists():
        (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    if not (folder / "merges.txt").exists():
        # A merge is a pair, or one text in older files.
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
