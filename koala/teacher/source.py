"""What every source of a pipeline gives: configurations first, so that a wrong pipeline is refused before gigabytes come."""

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from koala.teacher.config import SAFETENSORS
from koala.teacher.layout import is_index, plain_index


class Source(Protocol):
    """Where the files of a pipeline come from."""

    def configurations(self, to: Path) -> None:
        """Write model_index.json, configurations, vocabularies and the licence, where there is one, into the folder `to`."""

    def weights(self, to: Path, parts: Collection[str]) -> None:
        """Write the weights of `parts` into `to`, which has its configurations."""


def place(files: Mapping[str, str], source: Path, to: Path, link: bool = False) -> None:
    """Copy files of `source` into `to`, under their names there; with `link`, weights become hard links where that works."""
    for name, target in files.items():
        new = to / target
        new.parent.mkdir(parents=True, exist_ok=True)
        if is_index(name):
            new.write_text(json.dumps(plain_index(source / name), indent=2) + "\n")
        elif link and name.endswith(SAFETENSORS):
            _link(source / name, new)
        else:
            shutil.copyfile(source / name, new)


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def save_weights(model: Any, folder: Path) -> None:
    """Replace the weights in a part's folder with those of `model`, in one file; its configuration stays as it is."""
    with tempfile.TemporaryDirectory(dir=folder) as written:
        model.save_pretrained(written, safe_serialization=True, max_shard_size="1TB")
        for old in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
            old.unlink()
        for new in Path(written).glob("*.safetensors"):
            os.replace(new, folder / new.name)
