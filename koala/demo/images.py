"""Images of koala.demo.shapes with their captions: what the demo's teacher is trained on."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from koala.teacher.config import ImageSet

if TYPE_CHECKING:
    from PIL.Image import Image

    from koala.demo.shapes import Scene


class Shapes(ImageSet):
    """Drawn shapes, the scenes 0 to `count` - 1 of the series `seed`."""

    kind: Literal["shapes"] = "shapes"
    count: int = Field(default=8000, gt=0)
    """Number of images."""
    seed: int = 0
    """Seed of scenes and phrasings."""

    def captions(self) -> Sequence[str]:
        """Return a true sentence about each scene."""
        from koala.demo.shapes import caption

        return [caption(scene, self.seed, index) for index, scene in enumerate(self._scenes())]

    def images(self, side: int) -> "Sequence[Image]":
        """Return the drawn scenes, `side` x `side` pixels."""
        from koala.demo.shapes import draw

        return [draw(scene, side) for scene in self._scenes()]

    def sentences(self) -> Iterable[str]:
        """Yield every caption that a scene can have."""
        from koala.demo.shapes import ALL_ATTRIBUTES, PHRASES, describe

        return (describe(attributes, phrase) for attributes in ALL_ATTRIBUTES for phrase in PHRASES)

    def _scenes(self) -> "list[Scene]":
        from koala.demo.shapes import sample_scene

        return [sample_scene(self.seed, index) for index in range(self.count)]
