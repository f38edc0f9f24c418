"""Agreement with the teacher: PSNR between images of the same prompts and seeds."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from koala.evaluate.metrics.base import Column, Metric
from koala.evaluate.prompts import Prompt

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_LEAST_ERROR = 1e-3  # mean squared error counted for equal images, whose PSNR is infinite: 78 dB


class Psnr(Metric):
    """PSNR, in dB, of a student's images against the teacher's: `agreement_db`."""

    columns: ClassVar[Mapping[str, Column]] = {"agreement_db": Column("PSNR to teacher", "{:.1f} dB")}

    kind: Literal["psnr"] = "psnr"
    """Name of the kind."""

    def measure(
        self, images: "Sequence[Image]", prompts: Sequence[Prompt], reference: "Sequence[Image] | None"
    ) -> dict[str, list[float]]:
        """Return `agreement_db`, or nothing for the teacher itself."""
        return {} if reference is None else {"agreement_db": agreement(images, reference)}


def agreement(images: "Sequence[Image]", reference: "Sequence[Image]") -> list[float]:
    """Return the PSNR in dB of each 8-bit RGB image against that of the same index in `reference`."""
    import numpy as np

    pairs = zip(images, reference, strict=True)
    errors = [np.mean((_pixels(image) - _pixels(other)) ** 2) for image, other in pairs]
    return [float(10 * np.log10(255**2 / max(error, _LEAST_ERROR))) for error in errors]


def _pixels(image: "Image") -> "np.ndarray":
    import numpy as np

    return np.asarray(image.convert("RGB"), dtype=np.float32)
