"""The checker is what the demo's measurements rest on: right on good pictures, and blind to bad ones."""

import io

import numpy as np
import pytest
from PIL import Image

from koala.demo import shapes

SIDE = 32


def scenes(count: int) -> list[shapes.Scene]:
    return [shapes.sample_scene(11, index) for index in range(count)]


def test_read_is_right_for_every_combination() -> None:
    right: dict[shapes.Attributes, list[bool]] = {}
    for scene in scenes(1000):
        right.setdefault(scene.attributes, []).append(shapes.read(shapes.draw(scene, SIDE)) == scene.attributes)
    assert set(right) == set(shapes.ALL_ATTRIBUTES)
    answers = [answer for each in right.values() for answer in each]
    assert np.mean(answers) >= 0.99
    assert min(np.mean(each) for each in right.values()) >= 0.75, "one kind of picture is misread as a rule"


def test_read_survives_jpeg() -> None:
    def squeezed(scene: shapes.Scene) -> Image.Image:
        buffer = io.BytesIO()
        shapes.draw(scene, 64).save(buffer, "JPEG", quality=95, subsampling=0)
        return Image.open(buffer).resize((SIDE, SIDE), Image.Resampling.BOX)

    assert np.mean([shapes.read(squeezed(scene)) == scene.attributes for scene in scenes(200)]) >= 0.99


@pytest.mark.parametrize("colour", [*shapes.BACKGROUNDS.values(), *shapes.COLOURS.values()])
def test_read_sees_nothing_on_a_blank(colour: tuple[int, int, int]) -> None:
    assert shapes.read(Image.new("RGB", (SIDE, SIDE), colour)) is None


def test_read_sees_nothing_in_noise() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        fine = Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
        assert shapes.read(coarse.resize((SIDE, SIDE), Image.Resampling.NEAREST)) is None
        assert shapes.read(fine) is None


@pytest.mark.filterwarnings("error")
def test_read_sees_nothing_in_two_halves() -> None:
    split = Image.new("RGB", (SIDE, SIDE), "white")
    split.paste((20, 20, 20), (0, 0, SIDE // 2, SIDE))
    assert shapes.read(split) is None


def test_captions_say_what_is_drawn_and_vary() -> None:
    captions = [shapes.caption(scene, 11, index) for index, scene in enumerate(scenes(50))]
    for scene, caption in zip(scenes(50), captions, strict=True):
        assert set(vars(scene.attributes).values()) <= set(caption.split())
    assert len({" ".join(caption.split()[:2]) for caption in captions}) > 5


def test_series_and_index_decide_the_scene() -> None:
    assert shapes.sample_scene(11, 5) == shapes.sample_scene(11, 5)
    assert len({shapes.sample_scene(11, index) for index in range(30)}) == 30
    assert shapes.sample_scene(11, 5) != shapes.sample_scene(12, 5)
