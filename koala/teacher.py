"""The stage `teacher`: a pipeline folder of SDXL's layout, from the Hub at a pinned revision, or trained here (the demo's)."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from koala.console import say
from koala.demo.config import TinyTeacherConfig
from koala.errors import DISK_FULL, KoalaError
from koala.section import Section
from koala.work import resume_folder

if TYPE_CHECKING:
    from koala.config import Params
    from koala.tracking import StageRun


_WEIGHTS = "diffusion_pytorch_model.safetensors"
Revision = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$", description="a commit id: a name that moves is no revision")]


class HubPart(Section):
    """A part from a repository of its own: its weights, one .safetensors whatever its name, and configurations."""

    repository: str
    revision: Revision
    files: tuple[str, ...] = ("config.json", _WEIGHTS)

    @field_validator("files")
    @classmethod
    def _only_data(cls, files: tuple[str, ...]) -> tuple[str, ...]:
        weights = [file for file in files if file.endswith(".safetensors")]
        if len(weights) != 1 or not all(file.endswith((".safetensors", ".json")) for file in files):
            raise ValueError("must be one .safetensors file, and .json files")
        return files


class HubTeacherConfig(Section):
    """A teacher on the Hugging Face Hub.

    unet: takes the place of the pipeline's own (few-step teachers come as a U-Net alone). vae: likewise (SDXL's gives NaN
    in fp16). scheduler: values that its configuration has otherwise.
    """

    kind: Literal["hub"]
    repository: str
    revision: Revision
    unet: HubPart | None = None
    vae: HubPart | None = None
    scheduler: dict[str, str | int | float | bool] = Field(default_factory=dict)


TeacherConfig = Annotated[HubTeacherConfig | TinyTeacherConfig, Field(discriminator="kind")]

# Configurations, vocabularies and safetensors: nothing that is unpickled or run.
_PATTERNS = ("model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors")
_SECOND_COPIES = ("*.fp16.*", "vae_*/*")


def run(params: "Params", run: "StageRun") -> None:
    """Put the teacher's pipeline folder at `params.out("teacher")`."""
    config = params.teacher
    if isinstance(config, TinyTeacherConfig):
        from koala.demo.teacher import train

        folder = train(config, run)
    else:
        folder = fetch(config)
    out = params.out("teacher")
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, out, dirs_exist_ok=True)


def fetch(config: HubTeacherConfig) -> Path:
    """Download the teacher's files into the resume folder; what is there already is not fetched again.

    Raises KoalaError where the Hub cannot be reached or does not give the files.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    work = resume_folder("teacher", config=config.model_dump())
    folder = work / "pipeline"
    parts = {name: part for name, part in (("unet", config.unet), ("vae", config.vae)) if part}
    source = config.repository
    say(f"teacher: {source} at {config.revision[:8]}")
    try:
        snapshot_download(
            config.repository,
            revision=config.revision,
            local_dir=folder,
            allow_patterns=list(_PATTERNS),
            ignore_patterns=[*_SECOND_COPIES, *(f"{name}/*.safetensors" for name in parts)],
        )
        for name, part in parts.items():
            source = part.repository
            say(f"teacher: its {name} from {source} at {part.revision[:8]}")
            fetched = work / name
            snapshot_download(
                part.repository, revision=part.revision, local_dir=fetched, allow_patterns=list(part.files)
            )
            for each in part.files:
                shutil.copyfile(fetched / each, folder / name / (each if each.endswith(".json") else _WEIGHTS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        raise KoalaError(
            f"cannot fetch the teacher's {source} from the Hugging Face Hub ({_reason(error)}): "
            "check the names, the network and `hf auth login`, or use `profile: demo`, which needs none of them"
        ) from None
    if config.scheduler:
        file = folder / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config.scheduler, indent=2) + "\n")
    return folder


def _reason(error: Exception) -> str:
    missing = isinstance(error, FileNotFoundError) and error.filename
    return f"it has no {Path(missing).name}" if missing else type(error).__name__
