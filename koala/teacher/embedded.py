"""Single files that hold their own configurations and tokenizers, as koala writes them: they are read without the Hub.

Two entries of the safetensors header carry them: CONFIGURATIONS, a JSON mapping of path to content, and TOKENIZERS, such a
mapping of texts, compressed (SDXL's vocabularies are megabytes as text).
"""

import json
import lzma
import re
import struct
import tempfile
from base64 import b64decode, b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.errors import KoalaError, line_of
from koala.teacher.layout import MODEL_INDEX, MODELS, PARTS, configurations, read_index
from koala.teacher.original import places
from koala.teacher.shape import read_json

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionXLPipeline

CONFIGURATIONS = "koala.configurations"
TOKENIZERS = "koala.tokenizers"
UNET = "unet/config.json"
"""The only entry of CONFIGURATIONS in a U-Net's file."""

_HEADER_LIMIT, _TEXT_LIMIT = 100_000_000, 100_000_000  # bytes; safetensors itself refuses larger headers
_NAME = re.compile(rf"{re.escape(MODEL_INDEX)}|(?:{'|'.join(PARTS)})/[\w-][\w.-]*\.(?:json|txt)")


def embed(folder: Path) -> dict[str, str]:
    """Return the header's entries for the configurations and tokenizers of a pipeline folder."""
    files = sorted(file.relative_to(folder).as_posix() for file in folder.glob("*/*") if file.is_file())
    texts = {name: (folder / name).read_text() for name in configurations(files, read_index(folder, str(folder)))}
    tokenizers = {name: text for name, text in texts.items() if name.startswith("tokenizer")}
    small = {name: json.loads(text) for name, text in texts.items() if name not in tokenizers}
    return {
        CONFIGURATIONS: json.dumps({MODEL_INDEX: read_json(folder / MODEL_INDEX), **small}),
        TOKENIZERS: b64encode(lzma.compress(json.dumps(tokenizers).encode())).decode(),
    }


def metadata(file: Path) -> dict[str, str]:
    """Return the metadata in a safetensors file's header; an empty mapping where `file` is none."""
    try:
        with file.open("rb") as content:
            (length,) = struct.unpack("<Q", content.read(8))
            header = json.loads(content.read(length)) if length <= _HEADER_LIMIT else {}
    except (OSError, ValueError, struct.error):
        return {}
    found = header.get("__metadata__") if isinstance(header, dict) else None
    return found if isinstance(found, dict) else {}


def is_embedded(file: Path) -> bool:
    """Return whether a single file holds its configurations."""
    return CONFIGURATIONS in metadata(file)


def is_unet(file: Path) -> bool:
    """Return whether a file is a U-Net's, under diffusers' names, with its configuration."""
    found = metadata(file)
    return CONFIGURATIONS in found and list(_mapping(found[CONFIGURATIONS], file)) == [UNET]


def embedded(file: Path) -> dict[str, Any]:
    """Return the configurations in a single file, by path: `{"unet/config.json": {...}, ...}`.

    Raises KoalaError where they are not those of a whole pipeline.
    """
    packed = metadata(file)
    found = _mapping(packed[CONFIGURATIONS], file)
    if TOKENIZERS not in packed or not {MODEL_INDEX, *(f"{part}/config.json" for part in MODELS)} <= found.keys():
        raise KoalaError(
            f"{file} is not a whole pipeline (a U-Net's file?): give the file or folder of the whole model"
        )
    return found


def unpack(file: Path, to: Path) -> None:
    """Write the configurations and tokenizers in a single file into the folder `to`."""
    texts = {name: json.dumps(value, indent=2) + "\n" for name, value in embedded(file).items()}
    try:
        packed = b64decode(metadata(file)[TOKENIZERS])
        plain = lzma.LZMADecompressor().decompress(packed, _TEXT_LIMIT).decode()
    except (lzma.LZMAError, ValueError):
        raise KoalaError(f"{file}: its tokenizers cannot be read: fetch it again") from None
    for name, text in {**texts, **_mapping(plain, file)}.items():
        if not _NAME.fullmatch(name) or not isinstance(text, str):
            raise KoalaError(
                f"{file} names {name[:80]!r}, which is no file of a pipeline: fetch it from where it was made"
            )
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_text(text)


def _mapping(text: str, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise KoalaError(f"{file}: the configurations in it cannot be read: fetch it again")
    return found


def load_pipeline(file: Path, dtype: "torch.dtype") -> "StableDiffusionXLPipeline":
    """Load the pipeline that a single file with its own configurations holds.

    Raises KoalaError where the tensors are not those that the configurations name.
    """
    from diffusers import StableDiffusionXLPipeline

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        unpack(file, folder)
        read_index(folder, str(file))
        parts = {part: load_part(file, part, read_json(folder / part / "config.json"), dtype) for part in MODELS}
        return StableDiffusionXLPipeline.from_pretrained(
            folder, **parts, local_files_only=True, use_safetensors=True, add_watermarker=False
        )


def load_unet(file: Path, dtype: "torch.dtype") -> Any:
    """Load the U-Net of a file that `is_unet`. Raises KoalaError where its tensors are not those of its configuration."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    unet = empty_model("unet", _mapping(metadata(file)[CONFIGURATIONS], file)[UNET])
    try:
        unet.load_state_dict({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise KoalaError(
            f"{file} does not hold the U-Net of its configuration ({line_of(error)}): fetch it again"
        ) from None
    return unet.eval()


def load_part(file: Path, part: str, config: Mapping[str, Any], dtype: "torch.dtype") -> Any:
    """Load one part of a pipeline from a single file of the original layout, by the part's configuration.

    Raises KoalaError where a tensor that the configuration names is missing, or has another shape.
    """
    from safetensors import SafetensorError, safe_open

    model = empty_model(part, config)
    place = places(part, config)
    found: dict[str, torch.Tensor] = {}
    try:
        with safe_open(file, "pt") as tensors:
            there = set(tensors.keys())
            for name, empty in model.state_dict().items():
                origin = place(name)
                if origin is None:
                    continue
                if origin.name not in there:
                    raise KoalaError(f"{file}: its {part} lacks {origin.name}, which its configuration names")
                tensor = origin.read(tensors.get_tensor(origin.name))
                if tensor.shape != empty.shape:
                    raise KoalaError(f"{file}: {origin.name} does not fit the configuration of its {part}")
                # A view of a mapped file would keep the whole of a fused tensor.
                found[name] = tensor.to(dtype).contiguous().clone()
    except (OSError, SafetensorError) as error:
        raise KoalaError(f"{file} is not a safetensors file ({error}): fetch it again") from None
    model.load_state_dict(found, strict=True, assign=True)
    return model.eval()


def empty_model(part: str, config: Mapping[str, Any]) -> Any:
    """Return the model of a part without memory for its weights."""
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    kind = getattr(diffusers, MODELS[part], None) or getattr(transformers, MODELS[part])
    # Buffers are real: those that no file holds, such as CLIP's positions, keep their values.
    with init_empty_weights(include_buffers=False):
        if part in ("unet", "vae"):
            return kind.from_config(dict(config))
        return kind(transformers.CLIPTextConfig.from_dict(dict(config)))
