"""Augmentation of slices, each a map of indices that scipy itself makes."""

from functools import lru_cache

import numpy as np
from scipy import ndimage

from sdcl.inference import nearest_zoom

MAX_ANGLE_DEG = 20  # the range's upper end is excluded
OUTSIDE = -1  # index of pixels that a rotation brings in from beyond the image; they become 0


@lru_cache(maxsize=256)  # at 256x216 a map takes 0.2 MiB
def _rotation_index(shape: tuple[int, int], angle_deg: int) -> np.ndarray:
    """Return for each pixel of the rotated image the flat index of the pixel that it shows."""
    numbered = np.arange(1, shape[0] * shape[1] + 1, dtype=np.int32).reshape(shape)
    return ndimage.rotate(numbered, angle_deg, order=0, reshape=False, mode="constant", cval=0) - 1


def augmentation_index(shape: tuple[int, int], size: tuple[int, int], rng: np.random.Generator | None) -> np.ndarray:
    """Draw one augmentation as a map: output pixel to flat input index, or OUTSIDE.

    Half of the time a rotation by k * 90 degrees and a flip; otherwise half of the time a rotation by a whole angle in
    [-20, 20) degrees, order 0, without reshaping; then an order-0 zoom to the size.

    Args:
        shape: (H, W) of the slice, in pixels.
        size: (H', W') of the output.
        rng: None leaves out everything but the zoom.

    Returns:
        int32 (H', W').

    Source: docs/method.md, "Order of the data", ACDC's augmentation.
    """
    index = np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape)
    if rng is not None and rng.random() < 0.5:
        index = np.rot90(index, rng.integers(4))
        index = np.flip(index, rng.integers(2))
    elif rng is not None and rng.random() < 0.5:
        index = _rotation_index(shape, int(rng.integers(-MAX_ANGLE_DEG, MAX_ANGLE_DEG)))
    return nearest_zoom(index, size, fill=OUTSIDE)


def apply_index(array: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Show a slice (H, W) through a map of augmentation_index; pixels from outside are 0."""
    return np.append(array.ravel(), array.dtype.type(0))[index]  # OUTSIDE, -1, reads the appended 0
