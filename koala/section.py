"""The base of every configuration type: frozen, and an unknown key is refused."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of params.yaml. Lists become tuples, so that a configuration cannot be changed once it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")
