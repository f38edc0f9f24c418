"""Registration of small images: by which scale and shift one shows what another one does, and how alike the two are then.

A copy whose sides were cut off is the same picture stretched and shifted by a little, each axis by itself.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

SIDE = 64
"""Side of an image that is registered, pixels."""
QUALITY = 90
"""JPEG quality in which it is kept: about 2.5 KB."""
REACH = 0.15
"""Greatest scale and shift, as a share of the image."""
_BATCH = 128
_LEVELS = ((16, 6, 0.6), (32, 4, 0.8), (SIDE, 2, 0.0))
"""Side of each pyramid level, its iterations, and the correlation of grey values below which a pair goes no further."""
_BLUR = sum(
    weight * np.eye(SIDE, dtype=np.float32)[np.clip(np.arange(SIDE) + step, 0, SIDE - 1)]
    for step, weight in zip(range(-2, 3), (1 / 16, 1 / 4, 3 / 8, 1 / 4, 1 / 16), strict=True)
)
"""A binomial filter of five taps: edges survive a shift by half a pixel."""


def miniature(image: Image.Image) -> bytes:
    """Return `SIDE` x `SIDE` RGB pixels as a JPEG."""
    stream = io.BytesIO()
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    small.save(stream, "JPEG", quality=QUALITY, subsampling=0)
    return stream.getvalue()


def pixels(miniatures: Sequence[bytes]) -> np.ndarray:
    """Return the pixels of miniatures, n x `SIDE` x `SIDE` x 3, float32, blurred by one pixel."""
    images = [np.asarray(Image.open(io.BytesIO(data), formats=("JPEG",)), np.float32) for data in miniatures]
    rows = _BLUR @ np.stack(images).reshape(-1, SIDE, SIDE * 3)
    return (_BLUR @ rows.reshape(-1, SIDE, SIDE, 3)).reshape(-1, SIDE, SIDE, 3)


def correlations(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the correlation of each two images, -1 to 1, as they are or after registration, whichever is greater.

    left, right: n x `SIDE` x `SIDE` x 3, float32. Only what both images show is compared, without brightness and contrast.
    """
    parts = [slice(at, at + _BATCH) for at in range(0, len(left), _BATCH)]
    return np.concatenate([np.empty(0, np.float32), *(_correlations(left[part], right[part]) for part in parts)])


def _correlations(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    warps, there = np.zeros((len(left), 4), np.float32), np.arange(len(left))
    # As they are: a copy with its sides may have too little pattern to be registered.
    found = _correlation(left, right, warps, step=2)
    grey = [0.299 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2] for image in (left, right)]
    for side, steps, least in _LEVELS:
        a, b = (_reduced(image[there], side) for image in grey)
        warps = _registered(a, b, warps, steps)
        likely = _correlation(a[..., None], b[..., None], warps) >= least
        there, warps = there[likely], warps[likely]
    found[there] = np.maximum(found[there], _correlation(left[there], right[there], warps, step=2))
    return found


def _registered(a: np.ndarray, b: np.ndarray, warps: np.ndarray, steps: int) -> np.ndarray:
    """Improve the warps by which `b` shows what `a` does: least squares over shift, scale, contrast and brightness.

    a, b: n x s x s. warps: n x 4, shift and stretch of x, then of y, as shares of the side.
    Source: B. Lucas, T. Kanade, "An iterative image registration technique" (1981); Gauss-Newton.
    """
    side = a.shape[1]
    down, across = (slope * side for slope in np.gradient(b, axis=(1, 2)))
    x = _centres(side)
    for _ in range(steps):
        rows, columns, seen = _sampling(warps, side)
        moved, slope_x, slope_y = (rows @ image @ columns for image in (b, across, down))
        terms = (slope_x, slope_x * x, slope_y, slope_y * x[:, None], moved, np.ones_like(moved))
        jacobian = (np.stack(terms, -1) * seen[..., None]).reshape(len(a), side * side, len(terms))
        residual = ((a - moved) * seen).reshape(len(a), side * side, 1)
        transposed = jacobian.transpose(0, 2, 1)
        normal = transposed @ jacobian
        damping = 1e-3 * np.einsum("nii->ni", normal) + 1e-2  # what the image says nothing of stays as it is
        normal += damping[:, :, None] * np.eye(len(terms), dtype=np.float32)
        change = np.linalg.solve(normal, transposed @ residual)[:, :4, 0]
        warps = np.clip(warps + change, -REACH, REACH)
    return warps


def _correlation(a: np.ndarray, b: np.ndarray, warps: np.ndarray, step: int = 1) -> np.ndarray:
    """Return the correlation of `a` and the warped `b`, n x s x s x c, over what both show, by means of `step` x `step` pixels."""
    rows, columns, seen = _sampling(warps, a.shape[1], step)
    moved = np.stack([rows @ b[..., channel] @ columns for channel in range(b.shape[-1])], -1)
    seen = seen[..., None]
    count = np.maximum(seen.sum((1, 2, 3), keepdims=True) * a.shape[-1], 1)
    pair = _reduced(a, a.shape[1] // step), moved
    a, b = ((image - (image * seen).sum((1, 2, 3), keepdims=True) / count) * seen for image in pair)
    both, each = (a * b).sum((1, 2, 3)), (a * a).sum((1, 2, 3)) * (b * b).sum((1, 2, 3))
    return np.asarray(both / np.sqrt(np.maximum(each, 1)), np.float32)  # an image of one colour is like no other


def _sampling(warps: np.ndarray, side: int, step: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return matrices that sample rows and columns, and a mask of what is inside the image.

    Values are linear between pixels; of `step` samples there is the mean.
    """
    seen, weights = [], []
    for axis in (2, 0):
        at = (_centres(side) * (1 + warps[:, axis + 1, None]) + warps[:, axis, None] + 0.5) * side - 0.5
        seen.append(((at > -0.5) & (at < side - 0.5)).reshape(len(at), side // step, step).all(2))
        places = np.clip(at, 0, side - 1)[:, :, None]
        each = np.maximum(0, 1 - np.abs(places - np.arange(side, dtype=np.float32)))
        weights.append(each.reshape(len(at), side // step, step, side).mean(2))
    mask = (seen[0][:, :, None] & seen[1][:, None, :]).astype(np.float32)
    return weights[0], weights[1].transpose(0, 2, 1), mask


def _centres(side: int) -> np.ndarray:
    """Return the places of a side's pixels, from -0.5 to 0.5."""
    return (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5


def _reduced(images: np.ndarray, side: int) -> np.ndarray:
    """Return images of another side, each pixel the mean of some."""
    count, step = len(images), images.shape[1] // side
    return np.asarray(images.reshape(count, side, step, side, step, *images.shape[3:]).mean((2, 4)), np.float32)
