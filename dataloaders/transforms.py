"""Augmentation of slices, each a map of indices that scipy itself makes."""

from functools import lru_cache

import numpy as np
from scipy import ndimage

from sdcl.inference import nearest_zoom

OUTSIDE = -1  # index of pixels that a rotation brings in from beyond the image; they become 0


@lru_cache(maxsize=256)  # at 256x216 a map takes 0.2 MiB
def _rotation_index(shape: tuple[int, int], angle_deg: int) -> np.ndarray:
    """Return for each pixel of the rotated image the flat index of the pixel that it shows."""
    numbered = np.arange(1, shape[0] * shape[1] + 1, dtype=np.int32).reshape(shape)
    return ndimage.rotate(numbered, angle_deg, order=0, reshape=False, mode="constant", cval=0) - 1


def augmentation_index(
    shape: tuple[int, int],
    size: tuple[int, int],
    rng: np.random.Generator,
    probability: float = 0.5,
    max_angle_deg: int = 20,
) -> np.ndarray:
    """Draw one augmentation as a map: output pixel to flat input index, or OUTSIDE.

    With the probability a rotation by k * 90 degrees and a flip; otherwise, with the same probability, a rotation by a
    whole angle in [-max_angle_deg, max_angle_deg), order 0, without reshaping; then an order-0 zoom to the size.

    Args:
        shape: (H, W) of the slice, in pixels.
        size: (H', W') of the output.
        rng: source of randomness.
        probability: of each of the two kinds, one after the other.
        max_angle_deg: bound of the second kind's angle, in degrees; 0 leaves it out.

    Returns:
        int32 (H', W').

    Source: docs/method.md, "Order of the data", ACDC's augmentation.
    """
    index = np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape)
    if rng.random() < probability:
        index = np.rot90(index, rng.integers(4))
        index = np.flip(index, rng.integers(2))
    elif rng.random() < probability and max_angle_deg:
        index = _rotation_index(shape, int(rng.integers(-max_angle_deg, max_angle_deg)))
    return nearest_zoom(index, size, fill=OUTSIDE)


def apply_index(array: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Show a slice (H, W) through a map of augmentation_index; pixels from outside are 0."""
    return np.append(array.ravel(), array.dtype.type(0))[index]  # OUTSIDE, -1, reads the appended 0
