"""The stage `teacher`: a pipeline folder of SDXL's layout, from the Hub at a pinned revision, or trained here (the demo's)."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from koala.console import say
from koala.demo.config import TinyTeacherConfig
from koala.errors import KoalaError
from koala.section import Section
from koala.work import resume_folder

if TYPE_CHECKING:
    from koala.config import Params
    from koala.tracking import StageRun


class HubTeacherConfig(Section):
    """A teacher on the Hugging Face Hub. Revisions are commit ids: a name that moves is not a teacher.

    vae: a repository whose VAE takes the place of the pipeline's own (SDXL's gives NaN in fp16).
    """

    kind: Literal["hub"]
    repository: str
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    vae: str | None = None
    vae_revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")


TeacherConfig = Annotated[HubTeacherConfig | TinyTeacherConfig, Field(discriminator="kind")]

# Configurations, vocabularies and safetensors: nothing that is unpickled or run.
_PATTERNS = ("model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors")


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

    folder = resume_folder("teacher", config=config.model_dump()) / "pipeline"
    say(f"teacher: {config.repository} at {config.revision[:8]}")
    try:
        snapshot_download(
            config.repository,
            revision=config.revision,
            local_dir=folder,
            allow_patterns=list(_PATTERNS),
            ignore_patterns=["*.fp16.*", "vae_*/*"],  # second copies of the weights
        )
        if config.vae:
            snapshot_download(
                config.vae,
                revision=config.vae_revision,
                local_dir=folder / "vae",
                allow_patterns=["config.json", "diffusion_pytorch_model.safetensors"],
            )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise KoalaError(
            f"cannot fetch the teacher {config.repository} from the Hugging Face Hub ({type(error).__name__}): "
            "check the network and `hf auth login`, or use `profile: demo`, which needs neither"
        ) from None
    return folder
