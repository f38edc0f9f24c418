"""Parameters of publishing."""

from typing import Literal, Self

from pydantic import SerializeAsAny, model_validator

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
    """Licence of the weights, as the Hub names it; `other` for one that is not in its list."""

    license_name: str | None = None
    """Name of a licence that is not in the Hub's list, such as `sai-nc-community`."""

    license_link: str | None = None
    """Address of that licence's text; left out: the LICENSE.md that comes with the teacher."""

    base_model: str | None = None
    """Hub repository of the teacher, for the card."""

    datasets: tuple[str, ...] = ()
    """Hub data sets that the student was trained on, for the card."""

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type in which the released weights are stored."""

    targets: tuple[SerializeAsAny[Target], ...] = ()
    """Places that the release is sent to."""

    promote: Literal["ask", "automatic"] = "ask"
    """When a version that meets every rule becomes the latest: `automatic`, as soon as it is published; `ask`, once a person
    says yes. The flow `promote` follows it too."""

    single_file: bool = True
    """Whether the release also holds the pipeline as one file in SDXL's original layout, and its U-Net as another."""

    sampling: SamplingConfig = SamplingConfig()
    """Steps, guidance and prompt of the card's example."""

    @model_validator(mode="after")
    def _other_licence_is_named(self) -> Self:
        if (self.license == "other") != bool(self.license_name):
            raise ValueError("`license: other` goes with a license_name, and no other licence does")
        return self

    @property
    def licence(self) -> str:
        """Return the licence's name."""
        return self.license_name or self.license
