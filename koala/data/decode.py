"""Decoding of an image that nobody has vouched for, to 8-bit pixels as a browser shows them.

img2dataset's resizer decodes by OpenCV as the file says: 16 bits are cut, a palette's or CMYK's meaning is lost, colour profiles
and orientation are ignored, and alpha is laid on white in float64 (8 GB for an image of 105 million pixels). An image that
needs none of this goes to it as it came. Every other is decoded here and handed on as an uncompressed bitmap.
"""

import io
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from koala.config import Config

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP")
"""What is decoded, by Pillow's names. Other decoders of Pillow are not asked: fewer parsers meet what comes from the web."""
_BYTES_A_VALUE = {"I;16": 2, "I;16B": 2, "I;16L": 2, "I": 4, "F": 4}
_ORIENTATION = 0x0112


class UnusableError(Exception):
    """An image that is not kept; its text is the cause, a few words."""


class DecodeConfig(Config):
    """How an image becomes 8-bit RGB."""

    max_values: int = Field(default=80_000_000, gt=0)
    """Values of a decoded image at most: width x height x channels, 16-bit ones counted twice. It is judged by the header. At
    the default a process stays below 1 GB."""
    animated: Literal["first", "refuse"] = "first"
    """Of an animation the first frame, or none."""


def normalised(content: bytes, config: DecodeConfig) -> bytes:
    """Return an encoded image that OpenCV reads as a browser would show it: the same bytes where it does, else a bitmap.

    Raises:
        UnusableError: It is too large, an animation that is not wanted, or cannot be decoded.
    """
    from PIL import Image, UnidentifiedImageError

    Image.init()  # `formats` names decoders that are registered
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            channels = max(len(image.getbands()), 3)  # grey and palettes become RGB
            if width * height * channels * _BYTES_A_VALUE.get(image.mode, 1) > config.max_values:
                raise UnusableError("too many pixels")
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO" and config.animated == "refuse":
                raise UnusableError("animated")
            if _is_plain(image) and not _has_16_bits(content):
                return content
            image.seek(0)
            return _bitmap(_as_shown(image))
    except UnusableError:
        raise
    except Image.DecompressionBombError:
        raise UnusableError("too many pixels") from None
    except UnidentifiedImageError:
        raise UnusableError("no image") from None
    except Exception:
        # Decoders of untrusted bytes raise whatever they meet.
        raise UnusableError("cannot be decoded") from None


def _is_plain(image: "Image") -> bool:
    """Return whether OpenCV decodes it as it is shown."""
    return (
        image.format in ("JPEG", "PNG", "WEBP")
        and image.mode in ("RGB", "L")
        and "transparency" not in image.info
        and getattr(image, "n_frames", 1) == 1
        and image.getexif().get(_ORIENTATION, 1) == 1
        and not image.info.get("icc_profile")
    )


def _has_16_bits(content: bytes) -> bool:
    """Return whether it is a PNG of 16 bits a channel: Pillow shows those of RGB as 8-bit ones."""
    return content[:8] == b"\x89PNG\r\n\x1a\n" and content[24:25] == b"\x10"


def _as_shown(image: "Image") -> "Image":
    """Return RGB pixels, turned as EXIF says, in sRGB, on white."""
    from PIL import Image, ImageOps

    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    profile = image.info.get("icc_profile")
    if image.mode in _BYTES_A_VALUE:
        return _to_8_bit(image).convert("RGB")
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(with_alpha, mask=with_alpha.getchannel("A"))
    return _to_srgb(image, profile)


def _to_8_bit(image: "Image") -> "Image":
    """Scale 16-bit (or wider) grey values to 0..255, where a plain conversion would cut them."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if image.mode == "F":
        top = float(values.max()) if values.size and values.max() > 1 else 1.0
        scaled = values * np.float32(255 / top)
    else:
        scaled = values.astype(np.float32) * np.float32(255 / 65535)
    return Image.fromarray(np.rint(scaled.clip(0, 255)).astype(np.uint8))


def _to_srgb(image: "Image", profile: bytes | None) -> "Image":
    """Convert from an embedded colour profile; one that cannot be read is ignored, as browsers do."""
    from PIL import ImageCms

    if not profile:
        return image.convert("RGB")
    mode = image.mode if image.mode in ("RGB", "CMYK", "L") else "RGB"
    source = image.convert(mode)
    try:
        found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        shown = ImageCms.profileToProfile(source, found, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return source.convert("RGB")
    return shown if shown is not None else source.convert("RGB")


def _bitmap(image: "Image") -> bytes:
    """Return an RGB image as an uncompressed bitmap: OpenCV reads it at the speed of a copy."""
    return b"P6 %d %d 255\n" % image.size + image.tobytes()
