"""Images whose captions can be checked: a shape of a size and colour on a background, drawn, captioned and read back.

scene = sample_scene(seed=1, index=7)
image = draw(scene, 64)                         # PIL.Image, 64 x 64
caption(scene, seed=1, index=7)                 # "a large red circle on a white background"
read(image) == scene.attributes                 # size, colour, shape, background, read from the pixels only
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "green": (30, 160, 50),
    "blue": (35, 60, 225),
    "yellow": (245, 220, 40),
    "cyan": (40, 210, 225),
    "magenta": (215, 50, 200),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "black": (12, 12, 12),
}
SHAPES = ("circle", "square", "triangle")
SIZES: dict[str, float] = {"small": 0.19, "large": 0.27}
"""Scale of each size: half the side of a square with the shape's area, relative to the image's side."""

# For shapes of area 4, as the square of half side 1.
_CIRCLE_RADIUS = (4 / np.pi) ** 0.5
_TRIANGLE_SIDE = (16 / 3**0.5) ** 0.5

PHRASES = (
    "a {size} {colour} {shape} on a {background} background",
    "a {size} {colour} {shape} on {background}",
    "a {background} background with a {size} {colour} {shape}",
    "one {size} {shape} in {colour} on a {background} background",
)


@dataclass(frozen=True)
class Attributes:
    """The facts about an image that its caption states and `read` recovers."""

    size: str
    colour: str
    shape: str
    background: str


@dataclass(frozen=True)
class Scene:
    """An image before it is drawn: its attributes, and place and exact size, which the caption leaves open."""

    attributes: Attributes
    """What the caption states."""
    x: float
    """Centre of mass from the left, relative to the image's side."""
    y: float
    """Centre of mass from the top, relative to the image's side."""
    scale: float
    """Half the side of a square with the shape's area, relative to the image's side."""


ALL_ATTRIBUTES = tuple(
    Attributes(size, colour, shape, background)
    for size, colour, shape, background in product(SIZES, COLOURS, SHAPES, BACKGROUNDS)
)


def sample_scene(seed: int, index: int) -> Scene:
    """Return scene `index` of series `seed`. Attributes are uniform, place and exact size random."""
    random = np.random.default_rng((seed, index))
    attributes = ALL_ATTRIBUTES[random.integers(len(ALL_ATTRIBUTES))]
    return _place(attributes, random)


def _place(attributes: Attributes, random: np.random.Generator) -> Scene:
    scale = SIZES[attributes.size] * random.uniform(0.95, 1.05)
    room = 0.5 - scale * 1.77
    x, y = 0.5 + random.uniform(-1, 1, 2) * max(room, 0.02) * 0.3
    return Scene(attributes, float(x), float(y), float(scale))


def caption(scene: Scene, seed: int, index: int) -> str:
    """Return a true sentence about the scene, in one of several phrasings."""
    phrase = PHRASES[np.random.default_rng((seed, index, 1)).integers(len(PHRASES))]
    return describe(scene.attributes, phrase)


def describe(attributes: Attributes, phrase: str = PHRASES[0]) -> str:
    """Return a caption such as `a large red circle on a white background`."""
    return phrase.format(**vars(attributes))


def draw(scene: Scene, side: int, oversample: int = 4) -> Image.Image:
    """Draw the scene, `side` x `side` pixels, antialiased."""
    big = side * oversample
    image = Image.new("RGB", (big, big), BACKGROUNDS[scene.attributes.background])
    ink = COLOURS[scene.attributes.colour]
    outline = _outline(scene.attributes.shape, scene.x * big, scene.y * big, scene.scale * big)
    pen = ImageDraw.Draw(image)
    if scene.attributes.shape == "circle":
        pen.ellipse(outline, fill=ink)
    else:
        pen.polygon(outline, fill=ink)
    return image.resize((side, side), Image.Resampling.BOX)


def _outline(shape: str, x: float, y: float, scale: float) -> list[tuple[float, float]]:
    """Return the corners (of a circle, its bounding box) of a shape with area 4 scale^2 and centre of mass x, y."""
    if shape == "circle":
        radius = scale * _CIRCLE_RADIUS
        return [(x - radius, y - radius), (x + radius, y + radius)]
    if shape == "square":
        return [(x - scale, y - scale), (x + scale, y - scale), (x + scale, y + scale), (x - scale, y + scale)]
    side = scale * _TRIANGLE_SIDE
    height = side * 3**0.5 / 2
    return [(x, y - height * 2 / 3), (x + side / 2, y + height / 3), (x - side / 2, y + height / 3)]


# Reading. The border gives the background; the shape is what differs from it in colour. Colour, area and outline of the
# shape are compared with those that `draw` can produce.
_LEAST_CONTRAST = 60  # distance of shape and background in RGB
_PRESENT = 0.01  # share of the image that must differ from the background
_LEAST_OVERLAP = 0.75  # intersection over union of the shape and the best outline


def read(image: Image.Image) -> Attributes | None:
    """Read an image's attributes from its pixels; return None if it shows no shape that `draw` can produce.

    Correct for at least 99 % of drawn images of 32 px and more (tested).
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    side = pixels.shape[0]
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    solid = distance > 0.5 * np.percentile(distance, 99.5)
    if solid.mean() < _PRESENT or distance.max() < _LEAST_CONTRAST:
        return None
    inside = distance > 0.85 * np.percentile(distance[solid], 75)
    ink = np.median(pixels[inside], axis=0)
    if np.linalg.norm(ink - ground) < _LEAST_CONTRAST:
        return None
    cover = _coverage(pixels, ground, ink)
    area = cover.sum() / side**2
    scale = float(np.sqrt(area) / 2)
    shape, overlap = _best_outline(cover, scale)
    if overlap < _LEAST_OVERLAP:
        return None
    size = min(SIZES, key=lambda name: abs(np.log(scale / SIZES[name])))
    return Attributes(size, _nearest(ink, COLOURS), shape, _nearest(ground, BACKGROUNDS))


def _coverage(pixels: np.ndarray, ground: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """Return the share of each pixel that the shape covers, 0 to 1: height x width.

    The share is the pixel's position between background and shape colour, made steeper around the middle. An edge stays
    in place, and a faint haze around the shape does not count.
    """
    axis = ink - ground
    cover: np.ndarray = np.clip(((pixels - ground) @ axis / (axis @ axis) - 0.25) * 2, 0, 1)
    return cover


def _nearest(colour: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(colour - np.array(names[name]))))


def _best_outline(cover: np.ndarray, scale: float) -> tuple[str, float]:
    """Return the shape that overlaps `cover` most when drawn with its area and centre of mass, and that overlap."""
    side = cover.shape[0]
    rows, columns = np.mgrid[:side, :side] + 0.5
    total = cover.sum()
    x, y = float((columns * cover).sum() / total), float((rows * cover).sum() / total)
    overlaps = {}
    for shape in SHAPES:
        drawn = _mask(shape, x, y, scale * side, side)
        overlaps[shape] = float(np.minimum(drawn, cover).sum() / np.maximum(drawn, cover).sum())
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best, overlaps[best]


def _mask(shape: str, x: float, y: float, scale: float, side: int, oversample: int = 4) -> np.ndarray:
    """Return the coverage of a shape drawn at x, y (pixels): height x width."""
    image = Image.new("L", (side * oversample, side * oversample))
    outline = _outline(shape, x * oversample, y * oversample, scale * oversample)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(outline, fill=255)
    else:
        pen.polygon(outline, fill=255)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX), dtype=np.float32) / 255
