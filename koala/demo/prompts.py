"""The demo's prompts: every combination of size, colour, shape and background."""

from typing import Literal

from koala.evaluate.prompts import PromptSet, Written


class ShapesPrompts(PromptSet):
    """A prompt for each of the 108 combinations of attributes that the demo's images can show."""

    kind: Literal["shapes"] = "shapes"
    """Name of the kind."""

    def load(self) -> list[Written]:
        """Return the prompts, such as `a large red circle on a white background`."""
        from koala.demo.shapes import ALL_ATTRIBUTES, describe

        return [Written(describe(attributes), attributes.shape) for attributes in ALL_ATTRIBUTES]
