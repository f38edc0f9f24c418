"""Images of shards, decoded by Pillow: by the filter and by models that look at them."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMATS = ("JPEG", "PNG", "WEBP")


def decode(data: bytes) -> "tuple[Image | None, str | None]":
    """Return a decoded image; or None and the fault: `undecodable`, or `decompression_bomb` (more pixels than Pillow's limit).

    May be called from several threads.
    """
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        # Pillow itself only warns of an image above its limit, and refuses one above twice that.
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            return None, "decompression_bomb"
        image.load()
    except Image.DecompressionBombError:
        return None, "decompression_bomb"
    except Exception:  # Pillow's decoders raise anything on broken bytes
        return None, "undecodable"
    return image, None


def open_picture(data: bytes) -> "Image | None":
    """Return the RGB image, or None where there is a fault."""
    image, _ = decode(data)
    return image.convert("RGB") if image else None
