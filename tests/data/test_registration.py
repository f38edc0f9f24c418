"""Registration of crops: what is found, what is told apart, and that a pair's figure does not depend on its batch."""

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from koala.data.registration import SIDE, correlations, miniature, pixels

PHOTOGRAPH, FLOWER = (Image.fromarray(each).resize((600, 400)) for each in load_sample_images().images)


def compared(*pairs: tuple[Image.Image, Image.Image]) -> np.ndarray:
    return correlations(*(pixels([miniature(image) for image in side]) for side in zip(*pairs, strict=True)))


@pytest.mark.parametrize(
    "box", [(30, 20, 570, 380), (0, 0, 570, 400), (0, 0, 600, 380), (20, 5, 590, 385), (60, 0, 600, 400)]
)
def test_a_crop_is_registered_in_either_direction(box: tuple[int, int, int, int]) -> None:
    crop = PHOTOGRAPH.crop(box)
    assert compared((PHOTOGRAPH, crop), (crop, PHOTOGRAPH)).min() > 0.995


def test_brightness_and_contrast_do_not_count() -> None:
    assert compared((PHOTOGRAPH, PHOTOGRAPH.point(lambda value: value * 0.7 + 20)))[0] > 0.999


def test_other_pictures_are_far_below() -> None:
    halves = [FLOWER.crop((left, 0, left + 300, 400)) for left in (0, 300)]
    blank = Image.new("RGB", (80, 80), "white")
    pairs = [(PHOTOGRAPH, FLOWER), tuple(halves), (FLOWER, ImageOps.mirror(FLOWER)), (FLOWER, blank), (blank, blank)]
    assert compared(*pairs).max() < 0.9


def test_a_word_of_the_picture_tells_it_from_another() -> None:
    marked = FLOWER.copy()
    marked.paste("white", (60, 40, 240, 120))
    assert 0.5 < compared((FLOWER, marked))[0] < 0.98


def test_a_pair_gets_the_same_figure_in_any_batch() -> None:
    """Verdicts must not depend on what else is compared."""
    rng = np.random.default_rng(0)
    crops = [PHOTOGRAPH.crop((x, y, x + 540, y + 360)) for x, y in rng.integers(0, 40, (140, 2)).tolist()]
    left = pixels([miniature(PHOTOGRAPH)] * len(crops))
    right = pixels([miniature(crop) for crop in crops])
    together = correlations(left, right)
    alone = [correlations(left[index : index + 1], right[index : index + 1])[0] for index in range(0, 140, 7)]
    assert together[::7].tolist() == alone
    assert together.min() > 0.99
    assert correlations(left[:0], right[:0]).shape == (0,)
    assert left.shape == (140, SIDE, SIDE, 3)
