"""Augmentation of slices, each a map of indices that shows scipy's very pixels."""

import numpy as np
from scipy import special

from sdcl.inference import zoom_index

OUTSIDE = -1  # index of pixels that a rotation brings in from beyond the image; they become 0


def _rotated(shape: tuple[int, int], angle_deg: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return which pixels, by flat index, scipy.ndimage.rotate of order 0 shows at some rows and columns.

    The coordinates come of the same operations in the same order as in scipy, so that they round alike.

    Args:
        shape: (H, W) of the image, which the rotation keeps.
        angle_deg: whole degrees.
        rows: of the rotated image (H').
        columns: of the rotated image (W').

    Returns:
        int32 (H', W'), OUTSIDE where no pixel of the image lies.
    """
    cosine, sine = special.cosdg(angle_deg), special.sindg(angle_deg)
    matrix = np.array([[cosine, sine], [-sine, cosine]])
    centre = (np.array(shape) - 1) / 2
    offset = centre - matrix @ centre
    index, is_inside = np.int32(0), True
    for axis, side in enumerate(shape):
        place = np.add.outer(offset[axis] + matrix[axis, 0] * rows, matrix[axis, 1] * columns)
        is_inside = is_inside & (place >= 0) & (place <= side - 1)
        index = index * np.int32(side) + (place + 0.5).astype(np.int32)  # rounds down what is inside
    return np.where(is_inside, index, np.int32(OUTSIDE))


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
    numbers = np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape)
    angle_deg = None
    if rng.random() < probability:
        numbers = np.flip(np.rot90(numbers, rng.integers(4)), rng.integers(2))
    elif rng.random() < probability and max_angle_deg:
        angle_deg = int(rng.integers(-max_angle_deg, max_angle_deg))
    rows, columns = (zoom_index(side, out) for side, out in zip(numbers.shape, size, strict=True))
    if angle_deg is None:  # the map is a sum of one number a row and one a column
        index = numbers[rows, 0][:, None] + (numbers[0, columns] - numbers[0, 0])
    else:
        index = _rotated(shape, angle_deg, rows, columns)
    index[rows < 0] = index[:, columns < 0] = OUTSIDE
    return index


def apply_index(array: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Show a slice (H, W) through a map of augmentation_index; pixels from outside are 0."""
    return np.append(array.ravel(), array.dtype.type(0)).take(index)  # OUTSIDE, -1, reads the appended 0
