"""A pipeline folder that other versions of transformers read too: names of CLIP-L, and vocabularies of the tokenizers.

transformers 5 saves CLIP-L without `text_model.` and a tokenizer as tokenizer.json alone. transformers 4 would initialise
such an encoder anew, with only a warning, and finds no vocabulary. Both read what this makes of it.
"""

import json
import os
from pathlib import Path
from typing import Any

from koala.teacher.layout import is_index
from koala.teacher.shape import read_json

_PREFIX = "text_model."
_WEIGHTS = "model.safetensors"


def make_portable(folder: Path) -> None:
    """Give CLIP-L its prefixed names, and each tokenizer its vocab.json and merges.txt, in a folder that may be changed."""
    _prefix_clip_l(folder / "text_encoder")
    for tokenizer in (folder / "tokenizer", folder / "tokenizer_2"):
        if (tokenizer / "tokenizer.json").is_file():
            _split_tokenizer(tokenizer)


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
