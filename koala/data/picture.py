"""Images of shards, decoded by Pillow for models that look at them."""

import io

from PIL import Image

_FORMATS = ("JPEG", "PNG", "WEBP")


def open_picture(data: bytes) -> Image.Image | None:
    """Return the RGB image, or None where it cannot be decoded or has more pixels than Pillow considers safe.

    May be called from several threads.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or 0):  # Pillow itself only warns of the first ones
                return None
            return image.convert("RGB")
    except Exception:  # Pillow's decoders raise anything on broken bytes
        return None
