"""Parameters of publishing."""

from pydantic import Field

from koala.section import Section


class PublishConfig(Section):
    """What a student must reach to be released, and what its card says.

    require: metric of evaluate's metrics.json (dotted or slashed as it stands there) -> least value.
    """

    require: dict[str, float] = Field(default_factory=dict)
    license: str
    base_model: str | None = None
    steps: int = Field(gt=0, description="sampling steps that the card's example uses")
    guidance: float = Field(ge=0)
    example_prompt: str
