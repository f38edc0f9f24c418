"""One training as files: the job that the stage writes and every rank reads, and the names of what the ranks write."""

import re
from pathlib import Path
from typing import Self

from koala.config import Config
from koala.distill.config import DistillConfig

FILE = "job.json"


class Job(Config):
    """One training: a recipe, the artifacts that it reads, and the folder of its state."""

    config: DistillConfig
    """The recipe."""
    latents: Path
    """Encoded samples."""
    teacher: Path
    """The teacher's pipeline folder."""
    student: Path
    """The student's pipeline folder, as built."""
    new_captions: Path | None = None
    """New captions of the encoded samples (koala.data.captions.mixed), or None where there are none."""
    state: Path
    """Where checkpoints, losses and validation images go, and the trained U-Net at the end (UNET)."""

    def write(self) -> Path:
        """Write the job into its state folder and return the file's absolute path, which no other checkout has."""
        self.state.mkdir(parents=True, exist_ok=True)
        file = self.state.resolve() / FILE
        file.write_text(self.model_dump_json(indent=2) + "\n")
        return file

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a job that `write` wrote."""
        return cls.model_validate_json(file.read_text())


NEW_CAPTIONS = "new-captions.arrow"
"""File in the state: new captions, aligned with the encoded samples."""
UNET = "unet"
"""Folder in the state: the trained U-Net, written last."""
COMPLAINT = "complaint"
"""File in the state, in which a rank leaves an error message for the stage."""
VALIDATION = "validation"
"""Folder in the state: grids of validation images, `00000200.png` by step, and the teacher's images."""

_CHECKPOINT = re.compile(r"step-\d{8}")


def checkpoints(state: Path) -> list[Path]:
    """Return the complete checkpoints of a state folder, oldest first."""
    return sorted(path for path in state.glob("step-*") if _CHECKPOINT.fullmatch(path.name))
