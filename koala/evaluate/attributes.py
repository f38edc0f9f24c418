"""Attribute accuracy: how often a picture shows what its prompt asked for, by a checker that sees the pixels alone."""

from collections.abc import Callable, Sequence

from PIL import Image

from koala.demo.shapes import Attributes, read


def attribute_accuracy(
    images: Sequence[Image.Image],
    asked: Sequence[Attributes],
    reader: Callable[[Image.Image], Attributes | None] = read,
) -> dict[str, float]:
    """Shares of pictures that are right in size, colour, shape, background, and in `all` of them; and that show nothing.

    A picture in which the reader sees no shape counts as wrong in everything.
    """
    seen = [reader(image) for image in images]
    names = ("size", "colour", "shape", "background")
    right = {
        name: sum(getattr(what, name, None) == getattr(wanted, name) for what, wanted in zip(seen, asked, strict=True))
        for name in names
    }
    right["all"] = sum(what == wanted for what, wanted in zip(seen, asked, strict=True))
    right["nothing"] = sum(what is None for what in seen)
    return {f"attributes/{name}": count / len(images) for name, count in right.items()}
