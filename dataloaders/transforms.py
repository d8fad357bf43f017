"""What samples go through: crops of volumes; augmentations of slices, maps of indices to scipy's very pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from sdcl.inference import zoom_index

Crop = Literal["random", "centre"]
OUTSIDE = -1  # index of pixels that a rotation brings in from beyond the image; they become 0


@dataclass(frozen=True)
class Cropping:
    """What volumes go through at each reading.

    Attributes:
        size: sides of the crop, in voxels.
        crop: where it lies.
        intensity: strength of what shift_intensity() does afterwards.
    """

    size: Sequence[int]
    crop: Crop = "random"
    intensity: float = 0.0


def crop_corner(
    shape: Sequence[int], patch_size: Sequence[int], rng: np.random.Generator | None
) -> tuple[list[int], list[int]]:
    """Choose where a crop lies, as published.

    Where a side is no longer than the patch's, both of its ends are first padded by (patch - side) // 2 + 1.

    Args:
        shape: the volume's sides, in voxels.
        patch_size: the crop's sides, in voxels.
        rng: None takes the centre crop.

    Returns:
        The padding of both ends of each axis, and the crop's corner in the padded volume, uniform over
        [0, side - patch) for a random crop, round((side - patch) / 2) for the centre.

    Source: docs/method.md, "Order of the data", random crop and centre crop.
    """
    sides = list(zip(shape, patch_size, strict=True))
    is_small = any(side <= patch for side, patch in sides)
    pads = [max((patch - side) // 2 + 1, 0) if is_small else 0 for side, patch in sides]
    rooms = [side + 2 * pad - patch for (side, patch), pad in zip(sides, pads, strict=True)]
    corner = [round(room / 2) if rng is None else int(rng.integers(room)) for room in rooms]
    return pads, corner


def cropped(array: np.ndarray, pads: Sequence[int], corner: Sequence[int], patch_size: Sequence[int]) -> np.ndarray:
    """Return the crop of crop_corner() from an array (*S) or (channels, *S); what lies outside the volume is 0."""
    before = array.shape[: array.ndim - len(patch_size)]
    result = np.zeros((*before, *patch_size), array.dtype)
    source, target = [], []
    for pad, start, patch, side in zip(pads, corner, patch_size, array.shape[len(before) :], strict=True):
        begin, end = max(start - pad, 0), min(start - pad + patch, side)
        source.append(slice(begin, end))
        target.append(slice(begin - (start - pad), end - (start - pad)))
    result[(..., *target)] = array[(..., *source)]
    return result


def _rotated(shape: tuple[int, int], angle_deg: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return which pixels, by flat index, scipy.ndimage.rotate of order 0 shows at some rows and columns.

    The coordinates come of the same operations in the same order as in scipy, so that they round alike.

    Args:
        shape: (H, W) of the image, which the rotation keeps.
        angle_deg: whole degrees.
        rows: of the rotated image (H').
        columns: of the rotated image (W').

    Returns:
        intp (H', W'), OUTSIDE where no pixel of the image lies.
    """
    cosine, sine = special.cosdg(angle_deg), special.sindg(angle_deg)
    matrix = np.array([[cosine, sine], [-sine, cosine]])
    centre = (np.array(shape) - 1) / 2
    offset = centre - matrix @ centre
    numbers, is_outside = np.zeros((len(rows), len(columns))), np.zeros((len(rows), len(columns)), bool)
    for axis, side in enumerate(shape):
        place = np.add.outer(offset[axis] + matrix[axis, 0] * rows, matrix[axis, 1] * columns)
        is_outside |= place < 0
        is_outside |= place > side - 1
        place += 0.5
        numbers *= side
        numbers += np.floor(place, out=place)
    numbers[is_outside] = OUTSIDE
    return numbers.astype(np.intp)


@dataclass(frozen=True)
class Augmentation:
    """What slices go through at each reading.

    Attributes:
        size: (H', W') of the output.
        probability: of each of the two kinds, one after the other.
        max_angle_deg: bound of the second kind's angle, in degrees; 0 leaves it out.
        intensity: strength of what shift_intensity() does afterwards.
    """

    size: tuple[int, int]
    probability: float = 0.5
    max_angle_deg: int = 20
    intensity: float = 0.0


def augmentation_index(shape: tuple[int, int], how: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Draw one augmentation as a map: output pixel to flat input index, or OUTSIDE.

    With the probability a rotation by k * 90 degrees and a flip; otherwise, with the same probability, a rotation by a
    whole angle in [-max_angle_deg, max_angle_deg), order 0, without reshaping; then an order-0 zoom to the size.

    Args:
        shape: (H, W) of the slice, in pixels.
        how: size, probability and bound.
        rng: source of randomness.

    Returns:
        intp (H', W').

    Source: docs/method.md, "Order of the data", ACDC's augmentation.
    """
    # Without an angle the map is a sum of one number a row and one a column.
    of_rows, of_columns = np.arange(0, shape[0] * shape[1], shape[1]), np.arange(shape[1])
    angle_deg = None
    if rng.random() < how.probability:
        for _ in range(rng.integers(4)):  # np.rot90, once each
            of_rows, of_columns = of_columns[::-1], of_rows
        if rng.integers(2):  # np.flip along that axis
            of_columns = of_columns[::-1]
        else:
            of_rows = of_rows[::-1]
    elif rng.random() < how.probability and how.max_angle_deg:
        angle_deg = int(rng.integers(-how.max_angle_deg, how.max_angle_deg))
    sides = len(of_rows), len(of_columns)
    rows, columns = (zoom_index(side, out) for side, out in zip(sides, how.size, strict=True))
    if angle_deg is None:
        index = np.add.outer(of_rows[rows], of_columns[columns])
    else:
        index = _rotated(shape, angle_deg, rows, columns)
    for axis, shown in enumerate((rows, columns)):
        if shown.min() < 0:
            np.moveaxis(index, axis, 0)[shown < 0] = OUTSIDE
    return index


def shift_intensity(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Change an image's gamma, contrast and brightness at random, each channel by itself.

    A channel is brought to [0, 1] by its least and largest value, raised to the power g and brought back; then its
    distance from its mean is multiplied by c, and b of its standard deviation is added. log g and log c are uniform in
    +-log(1 + strength), b in +-strength.

    Args:
        image: (channels, *S) float32.
        strength: in [0, 1); 0 leaves the image as it is, and draws nothing.
        rng: source of randomness.

    Returns:
        (channels, *S) float32; a channel of one value stays as it is.
    """
    if not strength:
        return image
    changed = np.empty_like(image)
    for channel, result in zip(image, changed, strict=True):
        gamma, contrast = np.exp(rng.uniform(-1, 1, 2) * np.log1p(strength))
        shift = rng.uniform(-strength, strength)
        low, width = channel.min(), np.ptp(channel)
        curved = low + width * ((channel - low) / width) ** np.float32(gamma) if width else channel
        mean, deviation = curved.mean(), curved.std()
        result[...] = mean + (curved - mean) * contrast + shift * deviation
    return changed


def apply_index(array: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Show a slice (H, W), or (channels, H, W), through augmentation_index()'s map for (H, W); 0 comes from outside."""
    if array.ndim == 3:
        return np.stack([apply_index(channel, index) for channel in array])
    return np.append(array.ravel(), array.dtype.type(0)).take(index)  # OUTSIDE, -1, reads the appended 0
