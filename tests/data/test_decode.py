"""Decoding: what a browser shows is what the resizer gets, within bounds of memory."""

import io
import struct
import subprocess
import sys
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from koala.data.decode import DecodeConfig, UnusableError, normalised

SIDE = (48, 32)  # width, height


def picture() -> Image.Image:
    """Red at the left, blue at the right, with a ramp: a turn, a swap of channels or a cut is seen."""
    pixels = np.zeros((SIDE[1], SIDE[0], 3), np.uint8)
    pixels[..., 1] = np.linspace(0, 200, SIDE[1])[:, None]
    pixels[:, : SIDE[0] // 2, 0], pixels[:, SIDE[0] // 2 :, 2] = 220, 220
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def seen(content: bytes) -> np.ndarray:
    """What img2dataset's resizer decodes: height x width x RGB, or x 1 for grey."""
    pixels = cv2.imdecode(np.frombuffer(normalised(content, DecodeConfig()), np.uint8), cv2.IMREAD_UNCHANGED)
    assert pixels.dtype == np.uint8
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def near(one: np.ndarray, other: Image.Image | np.ndarray, most: float = 12) -> bool:
    return one.shape == np.asarray(other).shape and np.abs(one.astype(float) - np.asarray(other)).mean() < most


def png(depth: int, colour: int, row: bytes, height: int, width: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress((b"\0" + row) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})],
)
def test_what_needs_nothing_stays_as_it_came(kind: str, options: dict) -> None:
    content = encoded(picture(), kind, **options)
    assert normalised(content, DecodeConfig()) is content
    assert near(seen(content), picture())
    grey = encoded(picture().convert("L"), kind, **options)
    assert normalised(grey, DecodeConfig()) == grey or kind == "WEBP"


@pytest.mark.parametrize("kind", ["AVIF", "GIF", "BMP"])
def test_other_formats_are_decoded(kind: str) -> None:
    assert near(seen(encoded(picture(), kind)), picture())


def test_orientation_is_applied() -> None:
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encoded(picture(), "JPEG", quality=95, exif=exif)
        with Image.open(io.BytesIO(content)) as image:
            from PIL import ImageOps

            shown = ImageOps.exif_transpose(image)
        assert near(seen(content), shown), orientation
        assert (shown.size == SIDE) == (orientation < 5)


@pytest.mark.parametrize(("colour", "values"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bits_are_scaled_not_cut(colour: int, values: int) -> None:
    """A value of 0x8000 in every channel is a middle grey; opaque where there is alpha."""
    pixel = [0x8000] * values
    if colour in (4, 6):
        pixel[-1] = 0xFFFF
    content = png(16, colour, struct.pack(f">{values}H", *pixel) * 5, height=4, width=5)
    found = seen(content)
    assert found.shape == (4, 5, 3)
    assert np.abs(found.astype(int) - 128).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_alpha_is_laid_on_white(mode: str) -> None:
    image = Image.new("RGBA", SIDE, (200, 0, 0, 0))
    image.paste((200, 0, 0, 255), (0, 0, SIDE[0] // 2, SIDE[1]))
    image.paste((200, 0, 0, 128), (0, 0, SIDE[0] // 4, SIDE[1]))
    if mode == "P":
        flat = Image.new("P", SIDE, 1)
        flat.putpalette([200, 0, 0, 0, 0, 0])
        flat.paste(0, (0, 0, SIDE[0] // 2, SIDE[1]))
        content = encoded(flat, transparency=1)
    elif mode == "PA":
        content = encoded(image, "WEBP", lossless=True)
    else:
        content = encoded(image.convert(mode))
    found = seen(content)
    assert found.shape == (SIDE[1], SIDE[0], 3)
    assert (found[:, -1] == 255).all()
    red = 200 if mode != "LA" else 60
    assert np.abs(found[:, SIDE[0] // 2 - 1, 0].astype(int) - red).max() <= 2
    if mode in ("RGBA", "PA"):
        assert np.abs(found[:, 0].astype(int) - [227, 127, 127]).max() <= 2


@pytest.mark.parametrize(("mode", "left", "clear"), [("RGB", (200, 0, 0), (0, 9, 0)), ("L", 60, 0)])
def test_one_colour_that_is_transparent_is_white(mode: str, left: Any, clear: Any) -> None:
    image = Image.new(mode, SIDE, clear)
    image.paste(left, (0, 0, SIDE[0] // 2, SIDE[1]))
    found = seen(encoded(image, transparency=clear))
    assert found.shape == (SIDE[1], SIDE[0], 3)
    assert (found[:, -1] == 255).all()
    assert (found[:, 0] == left).all()


def test_cmyk_is_shown_in_rgb() -> None:
    content = encoded(picture().convert("CMYK"), "JPEG", quality=95)
    assert near(seen(content), picture(), 25)


def test_a_colour_profile_is_converted() -> None:
    """The same numbers under another profile are another colour; under sRGB's own, the same one."""
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert near(seen(encoded(picture(), icc_profile=lab)), picture(), 2)
    linear = _linear_profile()
    brighter = seen(encoded(picture(), icc_profile=linear))
    assert brighter.mean() > np.asarray(picture()).mean() + 20


def _linear_profile() -> bytes:
    """sRGB's profile with a linear curve in place of its own: values mean more light."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for number in range(struct.unpack(">I", content[128:132])[0]):
        name, place, _ = struct.unpack(">4sII", content[132 + 12 * number : 144 + 12 * number])
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            content[place : place + 12] = b"curv" + struct.pack(">II", 0, 0)  # no entries: the identity
    return bytes(content)


def test_a_profile_that_is_none_is_ignored() -> None:
    assert near(seen(encoded(picture(), icc_profile=b"not a profile" * 20)), picture(), 2)
    grey = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert near(seen(encoded(picture(), icc_profile=grey)), picture(), 2)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_or_nothing(kind: str) -> None:
    frames = [picture(), Image.new("RGB", SIDE, "white")]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert near(seen(content), picture())
    with pytest.raises(UnusableError, match="animated"):
        normalised(content, DecodeConfig(animated="refuse"))


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "no image"),
        (b"<!doctype html><title>x</title>", "no image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no image"),  # Pillow would start Ghostscript
        (b"%PDF-1.4", "no image"),
        (b"\x89PNG\r\n\x1a\n", "no image"),
        (b"\xff\xd8\xff", "no image"),
        (encoded(picture(), "TIFF"), "no image"),
        (encoded(picture())[:60], "cannot be decoded"),
        (encoded(picture().convert("RGBA"))[:-30], "cannot be decoded"),
        (encoded(picture(), "BMP")[:200], "cannot be decoded"),
        (png(8, 2, b"\0\0\0", 30_000, 30_000)[:200], "too many pixels"),
        (png(8, 6, b"\0\0\0\0", 4_473, 4_473)[:200], "too many pixels"),
        (png(16, 0, b"\0\0", 3_652, 3_652)[:200], "too many pixels"),
        (png(8, 2, b"\0\0\0", 100_000, 100_000)[:200], "too many pixels"),
    ],
)
def test_what_cannot_be_used_says_why(content: bytes, cause: str) -> None:
    with pytest.raises(UnusableError, match=cause):
        seen(content)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["alpha", "profile"])
def test_the_largest_image_keeps_a_process_below_a_gigabyte(kind: str, tmp_path) -> None:
    """As many values as are let through, in the forms that take the most copies, resized as img2dataset does."""
    if kind == "alpha":
        content = encoded(Image.new("RGBA", (4_470, 4_470), (1, 2, 3, 4)), compress_level=1)
    else:
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        content = encoded(Image.new("RGB", (5_160, 5_160), (1, 2, 3)), "JPEG", icc_profile=profile)
    (tmp_path / "image").write_bytes(content)
    code = r"""
import io, re, sys
sys.modules["torch"] = None
from img2dataset.resizer import Resizer
from koala.data.decode import DecodeConfig
from koala.data.workers import _resize
resizer = Resizer(1024, "keep_ratio", True)
found = _resize(DecodeConfig(), resizer, io.BytesIO(open(sys.argv[1], "rb").read()))
assert found[-1] is None and found[1] == 1024, found[1:]
print(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
"""
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "image")], capture_output=True, text=True, check=True
    )
    assert int(found.stdout) < 1_000_000  # KiB
