"""LoRAs of a teacher, renamed for its student: unconverted they load, and land on other modules of the same shape.

A student has its own numbers for what it keeps: KOALA's second pair of an up stage is the teacher's third. Names of
diffusers and peft (`unet.down_blocks.1...`, `lora_unet_down_blocks_1_...`) and of kohya (`lora_unet_input_blocks_4_1_...`)
keep their style. What the student lacks is dropped. Text encoders are the teacher's own: their weights pass unchanged.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from koala.errors import KoalaError
from koala.teacher.original import unet_blocks
from koala.teacher.shape import read_json
from koala.unet.blocks import Stage, teacher_stages
from koala.unet.student import KEPT, read_stages
from koala.unet.weights import weight_map

_PREFIX = r"(?:base_model\.model\.)?(?:unet\.|lora_unet_|(?:model\.)?diffusion_model\.)?"
_OF_TEXT = re.compile(r"lora_te|text_encoder|clip_[lg]\b|(?:base_model\.model\.)?text_model")
_LAYER = re.compile(r"[._]transformer_blocks[._](\d+)[._]")
_ADAPTER = "lora_adapter_metadata"  # diffusers' own entry in the header
_NAMES_IN_ADAPTER = ("unet.target_modules", "unet.rank_pattern", "unet.alpha_pattern")


@dataclass(frozen=True)
class Renaming:
    """How names of a teacher's U-Net become the student's, made by `renaming`."""

    blocks: Mapping[str, str | None]
    """The student's block for each of the teacher's, in each spelling; None: the student lacks it."""
    depths: Mapping[str, int]
    """Transformer layers that the student keeps in a block of the teacher's, in each spelling."""

    def __call__(self, name: str) -> str | None:
        """Return the student's name of a LoRA's tensor, or None where the student lacks its module.

        Raises KeyError for a name that is of neither the U-Net nor a text encoder.
        """
        if _OF_TEXT.match(name):
            return name
        match = self._pattern.match(name)
        if match is None:
            raise KeyError(name)
        block, rest = match["block"], name[match.end() :]
        new, layer = self.blocks[block], _LAYER.match(rest)
        if new is None or (layer and int(layer[1]) >= self.depths[block]):
            return None
        return f"{match['prefix']}{new}{rest}"

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        # A block ends where its name does: `input_blocks_1` is not the start of `input_blocks_10`.
        blocks = "|".join(map(re.escape, sorted(self.blocks, key=len, reverse=True)))
        return re.compile(rf"(?P<prefix>{_PREFIX})(?P<block>{blocks})(?=[._]|$)")


def renaming(teacher: Mapping[str, Any], student: Mapping[str, Any], stages: Sequence[Stage]) -> Renaming:
    """Return how names of the teacher's U-Net become the student's.

    Args:
        teacher: The teacher's UNet2DConditionModel configuration.
        student: The student's.
        stages: What the student keeps, from `koala.unet.blocks.keep` or `kept`.
    """
    originals, new_originals = unet_blocks(teacher), unet_blocks(student)
    ends = ".weight"
    origins = weight_map(stages, [block + ends for block in new_originals])
    new = {origins[block + ends].removesuffix(ends): block for block in new_originals}
    depths = {
        f"{stage.path}.attentions.{pair}": depth
        for stage in stages
        for pair, depth in zip(stage.pairs, stage.depths, strict=True)
    }
    blocks: dict[str, str | None] = {}
    spelt_depths: dict[str, int] = {}
    for block, original in originals.items():
        mine = new.get(block)
        for old, renamed in ((block, mine), (original, mine and new_originals[mine])):
            for separator in (".", "_"):
                spelling = old.replace(".", separator)
                blocks[spelling] = renamed and renamed.replace(".", separator)
                spelt_depths[spelling] = depths.get(block, 0)
    return Renaming(blocks, spelt_depths)


def kept(folder: Path, teacher: Mapping[str, Any]) -> tuple[Stage, ...]:
    """Return what the student in a pipeline folder keeps of a teacher: what kept.json says, or what shapes allow alone.

    A first pair takes the deeper stage's output, a last one the first skip of its level: where a stage keeps only those, or
    all, no other pair of the teacher would have fitted. Raises KoalaError where its configuration leaves a choice.
    """
    if (folder / KEPT).is_file():
        return read_stages(folder)
    return kept_by_shape(read_json(folder / "unet" / "config.json"), teacher, str(folder))


def kept_by_shape(student: Mapping[str, Any], teacher: Mapping[str, Any], name: str) -> tuple[Stage, ...]:
    """Return what the student of a U-Net's configuration keeps of a teacher, as `kept` without kept.json does."""
    own = {stage.path: stage for stage in teacher_stages(teacher)}
    found = []
    for stage in teacher_stages(student):
        whole = own[stage.path].pairs if stage.path in own else ()
        ends = whole[:1] if stage.path.startswith("down") else (*whole[:1], *whole[-1:])
        pairs = next((each for each in (whole, ends) if len(each) == len(stage.pairs)), None)
        if pairs is None:
            raise KoalaError(
                f"{name} does not say which of the teacher's pairs its {stage.name} keeps: "
                f"name its folder among the students or the distilled, which has {KEPT}"
            )
        depths = tuple(own[stage.path].depths[pair] for pair in pairs)
        found.append(Stage(stage.name, stage.path, pairs, stage.depths, depths))
    return tuple(found)


def is_for(lora: Path, unet: Mapping[str, Any]) -> bool:
    """Return whether the U-Net has all modules of a LoRA under the names that it gives them."""
    from safetensors import SafetensorError, safe_open

    own = renaming(unet, unet, teacher_stages(unet))
    try:
        with safe_open(lora, "pt") as opened:
            return all(own(name) for name in opened.keys())  # noqa: SIM118
    except KeyError:
        return False
    except (OSError, SafetensorError) as error:
        raise KoalaError(f"the LoRA {lora} is not a safetensors file ({error}): fetch it again") from None


@dataclass(frozen=True)
class Conversion:
    """What became of a LoRA's modules, by their names in the LoRA."""

    kept: tuple[str, ...]
    dropped: tuple[str, ...]


def convert(lora: Path, out: Path, rename: Renaming) -> Conversion:
    """Write the LoRA in the file `lora` for a student to the file `out`; return which modules of the U-Net were kept.

    Raises KoalaError for a file that is not a LoRA of the U-Net's teacher, or none of whose modules the student has.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    try:
        with safe_open(lora, "pt") as opened:
            names = list(opened.keys())
            metadata = dict(opened.metadata() or {})
            renamed = _renamed(names, rename, lora)
            tensors = {new: opened.get_tensor(name) for name, new in renamed.items() if new}
    except (OSError, SafetensorError) as error:
        raise KoalaError(f"the LoRA {lora} is not a safetensors file ({error}): fetch it again") from None
    modules = {name: new for name, new in renamed.items() if not _OF_TEXT.match(name)}
    found = {bool(fits): _modules(name for name, new in modules.items() if bool(new) == fits) for fits in (True, False)}
    if not tensors:
        raise KoalaError(f"the student has none of the {len(found[False])} modules of the LoRA {lora}")
    if _ADAPTER in metadata:
        metadata[_ADAPTER] = json.dumps(_adapter(json.loads(metadata[_ADAPTER]), rename))
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.partial")
    save_file(tensors, unfinished, metadata)
    os.replace(unfinished, out)
    return Conversion(kept=found[True], dropped=found[False])


def _renamed(names: Iterable[str], rename: Renaming, lora: Path) -> dict[str, str | None]:
    found = {}
    for name in names:
        try:
            found[name] = rename(name)
        except KeyError:
            raise KoalaError(
                f"the LoRA {lora} has {name}, which is no module of SDXL under diffusers', peft's or kohya's names: "
                "choose a LoRA for SDXL"
            ) from None
    return found


def _modules(names: Iterable[str]) -> tuple[str, ...]:
    """Return the modules that tensors belong to: their names up to what says which factor they are."""
    ends = (
        r"(?:\.processor\.(to_\w+?)_lora|\.lora\b|\.lora_\w+|\.alpha|\.dora_scale|\.hada_\w+|\.lokr_\w+|\.diff\w*).*$"
    )
    return tuple(dict.fromkeys(re.sub(ends, lambda match: f".{match[1]}" if match[1] else "", name) for name in names))


def _adapter(adapter: Mapping[str, Any], rename: Renaming) -> dict[str, Any]:
    """Return diffusers' description of a LoRA with the student's names in it."""

    def new(name: str) -> str | None:
        try:
            return rename(name)
        except KeyError:  # the end of a name, such as to_q, which holds for all
            return name

    found = dict(adapter)
    for field in _NAMES_IN_ADAPTER:
        values = adapter.get(field)
        if isinstance(values, dict):
            found[field] = {renamed: value for name, value in values.items() if (renamed := new(name))}
        elif isinstance(values, list):
            found[field] = [renamed for name in values if (renamed := new(name))]
    return found
