"""Parameters of publishing."""

from pydantic import SerializeAsAny

from koala.config import Config
from koala.evaluate.config import SamplingConfig
from koala.publish.approvals import Approval
from koala.publish.gate import Requirement
from koala.publish.targets.base import Target


class PublishConfig(Config):
    """What a student must reach to be released, what its card says, and where the release goes."""

    require: tuple[Requirement, ...] = ()
    """Rules that a student must meet to be released: `{metric: clip_score, of: teacher, at_least: 0.95}`."""

    approvals: tuple[Approval, ...] = ()
    """Verdicts that a person overruled. They stand in approvals.yaml, not in params.yaml."""

    license: str
    """Licence of the weights, as the Hub names it."""

    base_model: str | None = None
    """Hub repository of the teacher, for the card."""

    targets: tuple[SerializeAsAny[Target], ...] = ()
    """Places that the release is sent to."""

    single_file: bool = True
    """Whether the release also holds the pipeline as one file in SDXL's original layout, and its U-Net as another, in float16."""

    sampling: SamplingConfig = SamplingConfig()
    """Steps, guidance and prompt of the card's example."""
