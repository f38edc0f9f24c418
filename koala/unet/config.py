"""Parameters of a student's U-Net."""

from koala.config import Config
from koala.unet.blocks import StudentRule


class StudentConfig(Config):
    """What a student's U-Net is made of."""

    unet: StudentRule
    """Which of the teacher's blocks it keeps."""
    init_from: str | None = None
    """Start from the weights of an earlier release instead of the teacher's: a pipeline folder, or owner/name@COMMIT of the
    Hugging Face Hub. Its U-Net must have the shape that the rule gives."""
