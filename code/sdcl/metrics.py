"""Overlap and surface distances of two binary masks, by MedPy's definitions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree


@dataclass(frozen=True)
class CaseMetrics:
    """The four metrics of one class of one case.

    Attributes:
        dice: 2 |A and B| / (|A| + |B|), in [0, 1].
        jaccard: |A and B| / |A or B|, in [0, 1].
        hd95: 95th percentile of the surface distances of both directions pooled; voxels, or mm with a spacing.
        asd: mean distance from the prediction's surface to the reference's; voxels, or mm with a spacing.
        empty: the prediction or the reference has no voxel. Both distances are nan then; the overlaps are 0, or nan
            where both are empty and there is nothing to score.
    """

    dice: float
    jaccard: float
    hd95: float
    asd: float
    empty: bool


def case_metrics(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float] | None = None, distances: bool = True
) -> CaseMetrics:
    """Score one binary mask against its reference.

    Args:
        prediction: (*S), bool or 0/1.
        reference: the same shape.
        spacing: voxel sides in mm, one an axis; None: distances in voxels.
        distances: without it hd95 and asd are nan; they take most of the time.

    Raises:
        ValueError: the shapes differ.

    Source: docs/method.md, "Schedule, selection, test"; the definitions are those of medpy.metric.binary (dc, jc, hd95,
    asd), computed on the bounding box of both masks, which changes no distance.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"the prediction's shape {prediction.shape} differs from the reference's {reference.shape}")
    prediction, reference = _crop_to_both(np.asarray(prediction, bool), np.asarray(reference, bool))
    size_p, size_r = np.count_nonzero(prediction), np.count_nonzero(reference)
    if size_p == 0 or size_r == 0:
        overlap = math.nan if size_p == size_r else 0.0
        return CaseMetrics(overlap, overlap, math.nan, math.nan, empty=True)
    both = np.count_nonzero(prediction & reference)
    dice, jaccard = float(2 * both / (size_p + size_r)), float(both / (size_p + size_r - both))
    hd95 = asd = math.nan
    if distances:
        border_p, border_r = _border(prediction), _border(reference)
        to_reference = _nearest_distances(border_p, border_r, spacing)
        to_prediction = _nearest_distances(border_r, border_p, spacing)
        hd95 = float(np.percentile(np.concatenate([to_reference, to_prediction]), 95))
        asd = float(to_reference.mean())
    return CaseMetrics(dice, jaccard, hd95, asd, empty=False)


def _crop_to_both(prediction: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Crop two masks to the bounding box of their union; to nothing if both are empty."""
    either = prediction | reference
    box = []
    for axis in range(either.ndim):
        occupied = np.flatnonzero(either.any(tuple(a for a in range(either.ndim) if a != axis)))
        box.append(slice(occupied[0], occupied[-1] + 1) if len(occupied) else slice(0))
    return prediction[tuple(box)], reference[tuple(box)]


def _border(mask: np.ndarray) -> np.ndarray:
    """Return the voxels of a mask that touch, face to face, something outside it or outside the array."""
    interior = mask.copy()
    for axis in range(mask.ndim):
        along, inner = np.moveaxis(mask, axis, 0), np.moveaxis(interior, axis, 0)
        inner[1:] &= along[:-1]
        inner[:-1] &= along[1:]
        inner[[0, -1]] = False
    return np.greater(mask, interior, out=interior)  # true in the mask alone


def _nearest_distances(source: np.ndarray, target: np.ndarray, spacing: Sequence[float] | None) -> np.ndarray:
    """Return the distance of each surface voxel of source to the nearest of target.

    A k-d tree over the surface looks at thousands of voxels where a distance transform looks at all of the box, and
    the voxels that both surfaces share need no look at all.
    """
    scale = np.ones(source.ndim) if spacing is None else np.asarray(spacing, float)
    apart = np.argwhere(source > target) * scale  # of the source alone
    distances = np.zeros(np.count_nonzero(source))
    if len(apart):
        distances[: len(apart)] = cKDTree(np.argwhere(target) * scale).query(apart)[0]
    return distances
