"""Attribute accuracy: how often an image shows what its prompt asks for, read from the pixels alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from koala.demo.prompts import ShapesPrompts
from koala.evaluate.metrics.base import Column, Metric
from koala.evaluate.prompts import Prompt, PromptSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from koala.demo import shapes

    Reader = Callable[[Image], shapes.Attributes | None]

_NAMES = ("size", "colour", "shape", "background")


class Attributes(Metric):
    """Whether an image is right in size, colour, shape, background and all of them, and shows nothing: `attributes/...`."""

    columns: ClassVar[Mapping[str, Column]] = {
        "attributes/all": Column("attributes right", "{:.1%}", of_teacher=True, yes_no=True),
    }

    kind: Literal["attributes"] = "attributes"
    """Name of the kind."""

    def check(self, prompts: PromptSet) -> None:
        """Raise ValueError for prompts other than the demo's, whose attributes are not known."""
        if not isinstance(prompts, ShapesPrompts):
            raise ValueError("metric 'attributes' needs 'prompts: {kind: shapes}'")

    def names(self) -> tuple[str, ...]:
        """Return the attributes' scores, that of all, and that of images that show no shape."""
        return tuple(f"attributes/{name}" for name in (*_NAMES, "all", "nothing"))

    def measure(
        self, images: "Sequence[Image]", prompts: Sequence[Prompt], reference: "Sequence[Image] | None"
    ) -> dict[str, list[float]]:
        """Return 1 for each image that is right, or that shows no shape, and 0 for others."""
        from koala.demo.shapes import ALL_ATTRIBUTES, describe

        by_text = {describe(attributes): attributes for attributes in ALL_ATTRIBUTES}
        return attribute_accuracy(images, [by_text[prompt.text] for prompt in prompts])

    def plots(self, measured: Mapping[str, Mapping[str, float]]) -> "dict[str, Figure]":
        """Return a bar plot: a group for each attribute, a bar for each model."""
        from matplotlib.figure import Figure

        names = (*_NAMES, "all")
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / len(measured)
        for number, (label, values) in enumerate(measured.items()):
            places = [group + (number - (len(measured) - 1) / 2) * width for group in range(len(names))]
            axes.bar(places, [values[f"attributes/{name}"] for name in names], width, label=label)
        axes.set_xticks(range(len(names)), names)
        axes.set(ylabel="share of images that are right", ylim=(0, 1.02), title="Attributes asked for and seen")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
        return {"attributes": figure}


def attribute_accuracy(
    images: "Sequence[Image]", asked: "Sequence[shapes.Attributes]", reader: "Reader | None" = None
) -> dict[str, list[float]]:
    """Return 1 for each image that is right in an attribute, in `all`, or that shows `nothing`; 0 for others.

    An image in which the reader sees no shape counts as wrong in everything.

    Args:
        images: One image for each of `asked`.
        asked: What the prompts ask for.
        reader: Reads an image's attributes, None where there is no shape; left out, `koala.demo.shapes.read`.
    """
    from koala.demo.shapes import read

    seen = [(reader or read)(image) for image in images]
    pairs = list(zip(seen, asked, strict=True))
    right = {name: [getattr(what, name, None) == getattr(wanted, name) for what, wanted in pairs] for name in _NAMES}
    right["all"] = [what == wanted for what, wanted in pairs]
    right["nothing"] = [what is None for what in seen]
    return {f"attributes/{name}": [float(each) for each in images] for name, images in right.items()}
