"""The base of every metric of image quality."""

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, ClassVar

from koala import pretrained
from koala.config import Config
from koala.evaluate.prompts import Prompt, PromptSet

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from PIL.Image import Image


SETTING = "evaluate.metrics"
"""The parameter that names the models, for errors."""


@dataclass(frozen=True)
class Column:
    """A measured value's column in the report's table."""

    label: str
    """Heading of the column. `{model}` stands for the metric's model, `{count}` for the number of images."""

    format: str
    """Format string of a value, such as `{:.1%}`."""

    of_teacher: bool = False
    """Also compare the student with its teacher; for values of which more is better."""

    yes_no: bool = False
    """Whether an image's value is 0 or 1."""

    interval: bool = True
    """Whether it has an interval. A rule of the gate cannot name a figure without one."""

    spread: float | None = None
    """Of other values, assumed: the standard deviation, over prompts, of a good student's value less its teacher's, as a share
    of the teacher's mean. By it a rule of the gate knows how many prompts it needs; None: it is not known."""


@dataclass(frozen=True)
class SetFigure:
    """One figure of all of a model's images together."""

    value: float
    draws: "np.ndarray | None" = None
    """The figure over resamples of the prompts, by which its interval is found; None: it has none."""


class Metric(Config, ABC):
    """A measure of images; its kinds are subclasses, one file each. It measures each image, or a model's images together."""

    columns: ClassVar[Mapping[str, Column]] = {}
    """The scores that the report's table shows, by name."""

    kind: str
    """Name of the kind."""

    @property
    def model_name(self) -> str:
        """The name of the metric's model, without its owner or folder; empty where it has none."""
        return ""

    def check(self, prompts: PromptSet) -> None:
        """Raise ValueError where the metric cannot be computed on images of `prompts`."""

    def find(self) -> None:
        """Raise KoalaError where the metric's model is not there: said before images are generated."""

    def names(self) -> tuple[str, ...]:
        """Return the names of all scores that `measure` gives for a student."""
        return tuple(self.columns)

    def measure(
        self, images: "Sequence[Image]", prompts: Sequence[Prompt], reference: "Sequence[Image] | None"
    ) -> Mapping[str, Sequence[float]]:
        """Measure each of one model's images. The means and their intervals are koala.evaluate.statistics's.

        Args:
            images: One image a prompt. Opened on access: hold only a few at a time.
            prompts: What the images were generated from.
            reference: The teacher's images of the same prompts, or None where `images` are the teacher's.

        Returns:
            The value of each image, a finite number, by the score's name. Empty where the metric says nothing of these images.
        """
        return {}

    def measure_set(
        self, images: "Sequence[Image]", prompts: Sequence[Prompt], reference: "Sequence[Image] | None"
    ) -> Mapping[str, SetFigure]:
        """Measure one model's images together. Arguments as of `measure`. Return figures by the names of their columns."""
        return {}

    def plots(self, measured: Mapping[str, Mapping[str, float]]) -> "dict[str, Figure]":
        """Return plots by file name (without suffix). measured: a model's label -> all its values by name."""
        return {}


class ModelMetric(Metric, pretrained.PinnedModel):
    """A metric by a pretrained model."""

    def find(self) -> None:
        """Look for what the metric loads. Raises KoalaError, in one line, where it is not there; little is fetched."""
        pretrained.find(self.model, self.revision, "config.json", SETTING)

    @property
    def model_name(self) -> str:
        """The name of the metric's model, without its owner or folder."""
        return PurePath(self.model).name
