"""Layout of a pipeline folder: which files of it make up a teacher, and under which names.

Only what model_index.json names is taken: configurations, vocabularies and safetensors, never a pickle or code. Where a part
has its weights in half precision only (`model.fp16.safetensors`), they get the plain name.
"""

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from koala.errors import KoalaError
from koala.teacher.shape import read_json

MODEL_INDEX = "model_index.json"
MODELS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
"""Parts with weights, and their classes."""
LICENSE = "LICENSE.md"
"""The licence of a pipeline's weights, where it comes with one: it travels to the student and to its release."""
PARTS = (*MODELS, "tokenizer", "tokenizer_2", "scheduler")

_LICENSES = (LICENSE, "LICENSE", "LICENSE.txt")
_HALF = (".fp16", ".bf16")
_PRECISION = re.compile(r"\.(?:fp16|bf16)(?=[.-])")
_INDEX = re.compile(r"\.safetensors\.index(?:\.\w+)?\.json$")
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?:\.\w+)?\.safetensors$")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")


def read_index(folder: Path, origin: str) -> dict[str, tuple[str, str]]:
    """Return library and class of each part of SDXL's that model_index.json names.

    Raises KoalaError if it lacks a part of SDXL's, or names another class or code of its own.
    """
    index = read_json(folder / MODEL_INDEX)
    parts = {name: tuple(value) for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    parts = {name: value for name, value in parts.items() if value[0] is not None}
    for name in PARTS:
        if name not in parts:
            raise KoalaError(f"{origin}: {MODEL_INDEX} names no {name}: a teacher must be a pipeline of SDXL's kind")
    for name, (library, kind) in parts.items():
        if library not in ("diffusers", "transformers"):
            raise KoalaError(
                f"{origin}: {name} is of {library}, code that comes with the pipeline and that koala never runs: "
                "give a pipeline of diffusers' and transformers' own classes"
            )
        if name in MODELS and kind != MODELS[name]:
            raise KoalaError(f"{origin}: its {name} is a {kind}: a teacher of SDXL's kind has a {MODELS[name]}")
    return {name: (str(library), str(kind)) for name, (library, kind) in parts.items() if name in PARTS}


def leave_out_others(model_index: Path) -> None:
    """Strike the parts that a teacher does not have, such as an image encoder, off a model_index.json: they are not taken."""
    index = read_json(model_index)
    others = [name for name, value in index.items() if isinstance(value, list) and name not in PARTS and any(value)]
    if others:
        struck = index | {name: [None, None] for name in others}
        model_index.write_text(json.dumps(struck, indent=2) + "\n")


def configurations(files: Iterable[str], parts: Collection[str]) -> dict[str, str]:
    """Return the configurations and vocabularies among `files`, each with its name in the teacher."""
    return {
        file: file
        for file in files
        if _part(file) in parts and file.endswith((".json", ".txt")) and not _INDEX.search(file)
    }


def check_vocabularies(folder: Path, origin: str) -> None:
    """Raise KoalaError for a tokenizer without words: transformers would load it, and read every prompt as empty."""
    for name in ("tokenizer", "tokenizer_2"):
        if not any((folder / name / file).is_file() for file in ("vocab.json", "tokenizer.json")):
            raise KoalaError(f"{origin}: {name} has no vocabulary (vocab.json or tokenizer.json): add the file")


def licence(files: Collection[str]) -> dict[str, str]:
    """Return the licence among `files` with its name in the teacher; empty where there is none."""
    return dict.fromkeys([each for each in _LICENSES if each in files][:1], LICENSE)


def weights(files: Iterable[str], part: str, origin: str) -> dict[str, str]:
    """Return the files among `files` that hold the weights of `part`, each with its name in the teacher.

    The order of preference: one file, shards with their index, then both again in half precision. Raises KoalaError if
    there are none, or only pickles.
    """
    names = [file for file in files if _part(file) == part]
    stem = "diffusion_pytorch_model" if part in ("unet", "vae") else "model"
    own = [file for file in names if Path(file).name.startswith((f"{stem}.", f"{stem}-"))]
    for variant in ("", *_HALF):
        plain = {file: _PRECISION.sub("", file) for file in own if _variant(file) == variant}
        whole = {file: name for file, name in plain.items() if name == f"{part}/{stem}.safetensors"}
        sharded = {file: name for file, name in plain.items() if _INDEX.search(name) or _SHARD.search(name)}
        if whole or any(map(is_index, sharded)):
            return whole or sharded
    if any(file.endswith(_PICKLES) for file in names):
        raise KoalaError(
            f"{origin}: {part} is there only as a pickle, which koala never opens: convert it to safetensors"
        )
    raise KoalaError(f"{origin}: {part} has no {stem}.safetensors: a teacher is a whole pipeline, its weights included")


def _variant(file: str) -> str:
    """Return `.fp16` for `model.fp16.safetensors`, an empty string for `model.safetensors`."""
    found = _PRECISION.search(file)
    return found[0] if found else ""


def _part(file: str) -> str:
    """Return the folder of a file directly in a part's folder, or an empty string."""
    part, _, name = file.partition("/")
    return part if name and "/" not in name else ""


def read_shards(index: Path) -> dict[str, str]:
    """Return the file of each tensor that the index of sharded weights names. Raises KoalaError if it names none."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
        raise KoalaError(f"{index} has no weight_map that names the file of each tensor: fetch it again")
    return shards


def plain_index(index: Path) -> dict[str, Any]:
    """Return the index of sharded weights with the shards' plain names."""
    plain = {tensor: _PRECISION.sub("", file) for tensor, file in read_shards(index).items()}
    return {**read_json(index), "weight_map": plain}


def is_index(file: str) -> bool:
    """Return whether a file is the index of sharded weights."""
    return bool(_INDEX.search(file))
