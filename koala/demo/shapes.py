"""Pictures whose captions can be checked: a shape of a size and a colour on a background, drawn, told and read back.

scene = sample_scene(seed=1, index=7)
picture = draw(scene, 64)                       # PIL.Image, 64 x 64
caption(scene, seed=1, index=7)                 # "a large red circle on a white background"
read(picture) == scene.attributes               # size, colour, shape, background: seen in the pixels alone
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
# Half the side of a square as large in area as the shape, over the picture's side.
SIZES: dict[str, float] = {"small": 0.19, "large": 0.27}

# Corners or radius of each shape of area 4 (the square of half side 1), around its centre of mass.
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
    """What a caption says of a picture, and what `read` sees in it."""

    size: str
    colour: str
    shape: str
    background: str


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn: its attributes, and what a caption leaves open.

    x, y: the shape's centre of mass; scale: half the side of the square of the same area. All over the picture's side.
    """

    attributes: Attributes
    x: float
    y: float
    scale: float


ALL_ATTRIBUTES = tuple(
    Attributes(size, colour, shape, background)
    for size, colour, shape, background in product(SIZES, COLOURS, SHAPES, BACKGROUNDS)
)


def sample_scene(seed: int, index: int) -> Scene:
    """The scene number `index` of the series `seed`: all attributes equally often, place and exact size at random."""
    random = np.random.default_rng((seed, index))
    attributes = ALL_ATTRIBUTES[random.integers(len(ALL_ATTRIBUTES))]
    return _place(attributes, random)


def _place(attributes: Attributes, random: np.random.Generator) -> Scene:
    scale = SIZES[attributes.size] * random.uniform(0.95, 1.05)
    room = 0.5 - scale * 1.77
    x, y = 0.5 + random.uniform(-1, 1, 2) * max(room, 0.02) * 0.3
    return Scene(attributes, float(x), float(y), float(scale))


def caption(scene: Scene, seed: int, index: int) -> str:
    """A true sentence about the scene, in one of several phrasings."""
    phrase = PHRASES[np.random.default_rng((seed, index, 1)).integers(len(PHRASES))]
    return describe(scene.attributes, phrase)


def describe(attributes: Attributes, phrase: str = PHRASES[0]) -> str:
    """`a large red circle on a white background`."""
    return phrase.format(**vars(attributes))


def draw(scene: Scene, side: int, oversample: int = 4) -> Image.Image:
    """Draw the scene, `side` x `side` pixels, edges smoothed."""
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
    """A box (circle) or corners, of area 4 scale^2 and centre of mass x, y."""
    if shape == "circle":
        radius = scale * _CIRCLE_RADIUS
        return [(x - radius, y - radius), (x + radius, y + radius)]
    if shape == "square":
        return [(x - scale, y - scale), (x + scale, y - scale), (x + scale, y + scale), (x - scale, y + scale)]
    side = scale * _TRIANGLE_SIDE
    height = side * 3**0.5 / 2
    return [(x, y - height * 2 / 3), (x + side / 2, y + height / 3), (x - side / 2, y + height / 3)]


# Reading. The background is what the border shows; the shape is whatever lies far from it in colour; of it the colour,
# area and outline are compared with what could have been drawn.
_LEAST_CONTRAST = 60  # of shape and background, as a distance of RGB values
_PRESENT = 0.01  # of the picture must differ from the background, or there is no shape
_LEAST_OVERLAP = 0.75  # of the best outline and the shape seen (intersection over union), or it is no shape


def read(image: Image.Image) -> Attributes | None:
    """What a picture shows, read from its pixels alone; None where it shows no shape that `draw` could have drawn.

    Right for at least 99 % of drawn pictures of 32 px and more (tested).
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
    """How much of each pixel the shape covers, 0 to 1: height x width.

    It is how far the pixel's colour is on the way from the background's to the shape's, steepened about the middle: an
    edge stays where it is, a faint haze around the shape does not count.
    """
    axis = ink - ground
    return np.clip(((pixels - ground) @ axis / (axis @ axis) - 0.25) * 2, 0, 1)


def _nearest(colour: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(colour - np.array(names[name]))))


def _best_outline(cover: np.ndarray, scale: float) -> tuple[str, float]:
    """The shape that, drawn with the area and centre of mass of what is seen, overlaps it most; and that overlap."""
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
    """The coverage that a shape would have, drawn at x, y (pixels): height x width."""
    image = Image.new("L", (side * oversample, side * oversample))
    outline = _outline(shape, x * oversample, y * oversample, scale * oversample)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(outline, fill=255)
    else:
        pen.polygon(outline, fill=255)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX), dtype=np.float32) / 255
