"""The stage `teacher`: a pipeline folder of SDXL's layout, taken from where it is or trained here, that koala can distil.

    teacher(FolderTeacher(path="my-sdxl", loras=[{"file": "style.safetensors"}]), out=Path("teacher"), run=NoRun())

The folder holds what its model_index.json names, and teacher.json, which says where it came from.
"""

import hashlib
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from koala.errors import KoalaError
from koala.run import STATE, Run
from koala.teacher.check import check_configurations, check_weights
from koala.teacher.config import (
    SAFETENSORS,
    FileTeacher,
    FolderTeacher,
    HubTeacher,
    PretrainedTeacher,
    TeacherConfig,
    TinyTeacher,
)
from koala.teacher.hub import HubSource, place_part
from koala.teacher.layout import MODEL_INDEX, MODELS, leave_out_others
from koala.teacher.local import SDXL_REPOSITORY, SDXL_REVISION, FileSource, FolderSource
from koala.teacher.shape import read_json
from koala.teacher.source import Source

ORIGIN = "teacher.json"
"""File that says where a teacher came from. It is written last: a folder that holds it is whole."""


def teacher(config: TeacherConfig, out: Path, run: Run) -> None:
    """Write the teacher's pipeline folder to `out`, whole: nothing of an earlier teacher stays there.

    Raises KoalaError if the teacher cannot be had, or is not one that koala can distil.
    """
    origin = _origin(config)
    state = out / STATE
    # A folder's own files may have changed under the same path, and are copied in moments.
    if not isinstance(config, FolderTeacher) and (out / ORIGIN).is_file() and read_json(out / ORIGIN) == origin:
        shutil.rmtree(state, ignore_errors=True)
        return
    _claim(state, origin)
    if not (state / "moving").is_dir():
        made = state / "pipeline"
        if not made.is_dir():
            partial = state / "pipeline.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _make(config, partial, state, run)
            (partial / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
            partial.rename(made)
        for old in out.iterdir():
            if old != state:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        made.rename(state / "moving")
    # Folders first: nothing takes `out` for a teacher before its model_index.json is there.
    last = ("", MODEL_INDEX, ORIGIN)
    moving = (state / "moving").iterdir()
    for path in sorted(moving, key=lambda path: last.index(path.name) if path.name in last else 0):
        os.replace(path, out / path.name)
    shutil.rmtree(state)


def _make(config: TeacherConfig, to: Path, state: Path, run: Run) -> None:
    """Write the teacher into `to`; unfinished work is in `state`."""
    if isinstance(config, TinyTeacher):
        from koala.teacher.tiny import train

        train(config, to, state, run)
        check_configurations(to, config.origin)
    elif isinstance(config, PretrainedTeacher):
        _take(config, to, state)
    check_weights(to, config.origin)


def _take(config: PretrainedTeacher, to: Path, state: Path) -> None:
    """Write an existing pipeline into `to`: configurations, checked, then weights, then LoRAs."""
    source, replaced = _source(config, state), config.parts()
    source.configurations(to)
    leave_out_others(to / MODEL_INDEX)
    for name, part in replaced.items():
        place_part(name, part, to, state / name, ".json")
    if config.scheduler:
        file = to / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(read_json(file) | config.scheduler, indent=2) + "\n")
    check_configurations(to, config.origin)
    source.weights(to, [name for name in MODELS if name not in replaced])
    for name, part in replaced.items():
        place_part(name, part, to, state / name, SAFETENSORS)
    if config.loras:
        from koala.teacher.loras import fuse

        fuse(to, config.loras)


def _source(config: PretrainedTeacher, state: Path) -> Source:
    if isinstance(config, HubTeacher):
        return HubSource(config.repository, config.revision, state / "hub")
    if isinstance(config, FolderTeacher):
        return FolderSource(config.path)
    if isinstance(config, FileTeacher):
        of_sdxl = HubSource(SDXL_REPOSITORY, SDXL_REVISION, state / "hub")
        return FileSource(config.path, FolderSource(config.config) if config.config else None, of_sdxl)
    raise TypeError(f"no source for a teacher of kind {config.kind}")


def _origin(config: TeacherConfig) -> dict[str, Any]:
    """Return what decides the teacher: its configuration, and the SHA-256 of the local files that it names.

    Raises KoalaError if a LoRA or peft is missing, before anything is fetched.
    """
    files = [config.path] if isinstance(config, FileTeacher) else []
    if isinstance(config, PretrainedTeacher):
        if config.loras and find_spec("peft") is None:
            raise KoalaError("fusing LoRAs into the teacher needs peft, which is not installed: pip install peft")
        for lora in config.loras:
            if not lora.file.is_file():
                raise KoalaError(f"there is no LoRA at {lora.file}: correct `loras` of the teacher")
        files += [lora.file for lora in config.loras]
    return {"config": config.recipe(), "sha256": {str(file): _sha256(file) for file in files if file.is_file()}}


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _claim(state: Path, origin: dict[str, Any]) -> None:
    """Make the folder of unfinished work, emptied if it is another teacher's."""
    marker = state / ORIGIN
    if not marker.is_file() or read_json(marker) != origin:
        shutil.rmtree(state, ignore_errors=True)
        state.mkdir(parents=True)
        marker.write_text(json.dumps(origin, indent=2) + "\n")
