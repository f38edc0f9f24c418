"""A pipeline folder as one .safetensors file: SDXL's original layout, as ComfyUI and its relatives read it.

    write_checkpoint(Path("koala-700m"), Path("koala-700m.safetensors"), title="koala-700m", license="openrail++")
    write_unet(Path("koala-700m"), Path("koala-700m-unet.safetensors"), title="koala-700m", license="openrail++")

Tensors are read, converted and written one at a time. The header holds ModelSpec's fields, and the pipeline's
configurations and tokenizers, by which koala reads the file offline (koala.teacher.embedded).
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from koala.errors import KoalaError
from koala.publish.portable import as_type
from koala.teacher.embedded import CONFIGURATIONS, UNET, embed
from koala.teacher.layout import MODELS, weights
from koala.teacher.open_clip import THIRDS, Place
from koala.teacher.original import POSITION_IDS, places
from koala.teacher.shape import read_json
from koala.unet.blocks import teacher_stages
from koala.unet.reference import SDXL

# Transformer layers of each pair of the down stages, by which ComfyUI tells the U-Nets of SDXL's width apart.
_RECOGNISED = {
    (0, 0, 2, 2, 10, 10): "SDXL",
    (0, 0, 2, 2, 4, 4): "SSD1B",
    (0, 0, 1, 1, 2, 2): "Segmind_Vega",
    (0, 2, 5): "KOALA_700M",
    (0, 2, 6): "KOALA_1B",
}
_WIDTHS = ("block_out_channels", "cross_attention_dim", "projection_class_embeddings_input_dim", "in_channels")
_NORM_GROUPS = 32  # fixed in front ends

_CODES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_KINDS = {code: kind for kind, code in _CODES.items()}


def recognised_as(unet_config: Mapping[str, Any]) -> str | None:
    """Return the class as which ComfyUI recognises a U-Net of this configuration, or None: no front end will load it.

    Only widths and the depths of the down stages decide. (reference: ComfyUI's list of supported models)
    """
    if unet_config.get("norm_num_groups", _NORM_GROUPS) != _NORM_GROUPS:
        return None
    if any(_plain(unet_config.get(name)) != _plain(SDXL[name]) for name in _WIDTHS):
        return None
    down = [stage for stage in teacher_stages(unet_config) if stage.path.startswith("down")]
    return _RECOGNISED.get(tuple(depth for stage in down for depth in stage.depths))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def write_checkpoint(folder: Path, file: Path, *, title: str, license: str, dtype: str | None = "float16") -> None:
    """Write the pipeline in `folder` to `file`, in SDXL's original layout.

    Args:
        folder: The pipeline, as diffusers' `save_pretrained` writes it, with its tokenizers.
        file: Where the file goes; it is moved into place when it is whole.
        title: Name of the model, for the header.
        license: Licence of the weights, for the header.
        dtype: The weights' type; None keeps that of each tensor.

    Raises:
        KoalaError: A part is missing, has a tensor that the layout does not know, or a value that `dtype` cannot hold.
    """
    with ExitStack() as opened:
        entries: dict[str, _Entry] = {}
        for part in MODELS:
            entries |= _original(part, folder, opened)
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        positions = read_json(folder / "text_encoder" / "config.json").get("max_position_embeddings", 77)
        entries[POSITION_IDS] = _Entry("I64", (1, positions), lambda: torch.arange(positions)[None])
        # Front ends learn the objective by the presence of these names.
        if scheduler.get("prediction_type") == "v_prediction":
            entries["v_pred"] = _EMPTY
        if scheduler.get("rescale_betas_zero_snr"):
            entries["ztsnr"] = _EMPTY
        _write(file, _in(entries, dtype, folder), _model_spec(scheduler, folder, title, license) | embed(folder))


def write_unet(folder: Path, file: Path, *, title: str, license: str, dtype: str | None = "float16") -> None:
    """Write the U-Net of the pipeline in `folder` to `file`, under diffusers' names: for loaders of diffusion models.

    The arguments and errors are those of `write_checkpoint`.
    """
    with ExitStack() as opened:
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        config = json.dumps({UNET: read_json(folder / UNET)})
        spec = _model_spec(scheduler, folder, title, license) | {CONFIGURATIONS: config}
        _write(file, _in(dict(_tensors(folder, "unet", opened)), dtype, folder), spec)


def image_side(folder: Path) -> int:
    """Return the side of the images that a pipeline generates, in pixels."""
    latent: int = read_json(folder / "unet" / "config.json").get("sample_size") or SDXL["sample_size"]
    levels = len(read_json(folder / "vae" / "config.json")["block_out_channels"])
    return latent * int(2 ** (levels - 1))


def _model_spec(scheduler: Mapping[str, Any], folder: Path, title: str, license: str) -> dict[str, str]:
    """Return the fields of Stability AI's ModelSpec 1.0.0."""
    side = image_side(folder)
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.license": license,
        "modelspec.prediction_type": "v" if scheduler.get("prediction_type") == "v_prediction" else "epsilon",
        "modelspec.resolution": f"{side}x{side}",
    }


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file to be: its safetensors dtype, its shape, and how it is read."""

    code: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


_EMPTY = _Entry("F32", (0,), lambda: torch.zeros(0))


def _tensors(folder: Path, part: str, opened: ExitStack) -> Iterator[tuple[str, _Entry]]:
    """Yield name and entry of each tensor in a part's weights, sharded or not."""
    files = [file.relative_to(folder).as_posix() for file in sorted((folder / part).iterdir())]
    for shard in weights(files, part, str(folder)):
        if shard.endswith(".safetensors"):
            tensors = opened.enter_context(safe_open(folder / shard, "pt"))
            for name in list(tensors.keys()):
                view = tensors.get_slice(name)
                yield name, _Entry(view.get_dtype(), tuple(view.get_shape()), partial(tensors.get_tensor, name))


def _original(part: str, folder: Path, opened: ExitStack) -> dict[str, _Entry]:
    """Return the entries of a part under their original names."""
    place = places(part, read_json(folder / part / "config.json"))
    found: dict[str, _Entry] = {}
    thirds: dict[str, dict[str, _Entry]] = {}
    for name, entry in _tensors(folder, part, opened):
        try:
            origin = place(name)
        except KeyError:
            raise KoalaError(f"{folder}: its {part} has {name}, for which SDXL's layout has no place") from None
        if origin is None:
            continue
        if origin.form in THIRDS:
            thirds.setdefault(origin.name, {})[origin.form] = entry
        else:
            found[origin.name] = _placed(origin, entry)
    for name, parts in thirds.items():
        found[name] = _fused([parts[third] for third in THIRDS])
    return found


def _placed(place: Place, entry: _Entry) -> _Entry:
    shape = tuple(place.write(torch.empty(entry.shape, device="meta")).shape)
    return replace(entry, shape=shape, read=lambda: place.write(entry.read()))


def _fused(thirds: list[_Entry]) -> _Entry:
    first = thirds[0]
    return replace(
        first,
        shape=(sum(each.shape[0] for each in thirds), *first.shape[1:]),
        read=lambda: torch.cat([each.read() for each in thirds]),
    )


def _in(entries: Mapping[str, _Entry], dtype: str | None, folder: Path) -> dict[str, _Entry]:
    """Return the entries in the dtype that is asked for; whole numbers stay as they are."""
    for name, entry in entries.items():
        if entry.code not in _KINDS:
            raise KoalaError(f"{folder} holds {name} as {entry.code}: give weights in float32, float16 or bfloat16")
    if dtype is None:
        return dict(entries)
    kind: torch.dtype = getattr(torch, dtype)
    return {
        name: replace(entry, code=_CODES[kind], read=partial(_cast, entry, kind, f"{folder}: {name}"))
        if _KINDS[entry.code].is_floating_point
        else entry
        for name, entry in entries.items()
    }


def _cast(entry: _Entry, kind: torch.dtype, name: str) -> Tensor:
    return as_type(entry.read(), kind, name)


def _write(file: Path, entries: Mapping[str, _Entry], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, one tensor in memory at a time.

    The format: the header's length (8 bytes, little-endian), the header as JSON, then the tensors' bytes without gaps.
    """
    # Wider types first, so that every tensor is aligned.
    order = sorted(entries, key=lambda name: (-_KINDS[entries[name].code].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        entry = entries[name]
        start, end = end, end + torch.Size(entry.shape).numel() * _KINDS[entry.code].itemsize
        header[name] = {"dtype": entry.code, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.partial")
    try:
        with unfinished.open("wb") as out:
            out.write(len(text).to_bytes(8, "little"))
            out.write(text)
            for name in order:
                tensor = entries[name].read().contiguous()
                out.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
