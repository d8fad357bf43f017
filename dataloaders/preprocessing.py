"""From a scan in space to a network's input, and from its probabilities back onto the scan."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import ndimage

from dataloaders.scans import Scan
from sdcl.errors import UserError

Normalisation = Literal["zscore", "minmax", "ct"]
WINDOW_HU = (-125.0, 275.0)  # of "ct", mapped to [0, 1]
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Preprocessing:
    """How a raw scan becomes a network's input; each converted file and each run's config.json keep it.

    Attributes:
        normalise: "zscore" (zero mean, unit variance over the scan), "minmax" ([0, 1] over the scan) or "ct" (HU
            clipped to WINDOW_HU, mapped to [0, 1]).
        orientation: where the array's axes point, such as "LPS"; None: as the scan is stored.
        spacing_mm: voxel sides after resampling, in the array's axes; None: the scan's own.
        trust_slice_spacing: False resamples as if slices were as far apart as their pixels, the published way of
            Pancreas; slices lie across the axis whose voxel side is unlike the other two.
        layout: "volume" (X, Y, Z), or "slices" (slices, rows, columns), across the axis with the longest voxel side.
    """

    normalise: Normalisation
    orientation: str | None = "LPS"
    spacing_mm: tuple[float, float, float] | None = None
    trust_slice_spacing: bool = True
    layout: Literal["volume", "slices"] = "volume"

    def to_json(self) -> str:
        """Return the fields as JSON, the same text for the same fields."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Preprocessing":
        """Make it of what to_json() wrote, read back.

        Raises:
            ValueError: the fields are not these.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or set(fields) != names or fields["normalise"] not in Normalisation.__args__:
            raise ValueError(f"{fields} is no preprocessing, which has {', '.join(sorted(names))}")
        spacing = fields["spacing_mm"]
        return cls(**fields | {"spacing_mm": None if spacing is None else tuple(spacing)})


@dataclass(frozen=True)
class Prepared:
    """A preprocessed scan.

    Attributes:
        array: float32, (X, Y, Z) or (slices, rows, columns); or a label map, uint8.
        affine: (4, 4), from the array's indices to mm, RAS+.
    """

    array: np.ndarray
    affine: np.ndarray

    def cropped(self, box: Box) -> "Prepared":
        """Return the part inside a box ((first, end) of each axis)."""
        affine = self.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ [first for first, _ in box]
        return Prepared(self.array[tuple(slice(*side) for side in box)], affine)


def prepare(scan: Scan, how: Preprocessing, trust_hu: bool = False) -> Prepared:
    """Bring an image into a network's axes, voxels and range; `trust_hu` takes any values of a CT for HU."""
    turned = scan.oriented(how.orientation) if how.orientation else scan
    shape, affine = _grid(turned, how)
    array = normalised(resampled(turned.array, turned.affine, shape, affine, order=1), how.normalise, scan, trust_hu)
    order = _axes(affine, how)
    return Prepared(np.ascontiguousarray(array.transpose(order)), _permuted(affine, order))


def prepare_label(label: np.ndarray, image: Scan, how: Preprocessing) -> np.ndarray:
    """Bring a label map (X, Y, Z), on its image's grid, where prepare() brings the image; the nearest voxel decides."""
    turned = dataclasses.replace(image, array=label)
    turned = turned.oriented(how.orientation) if how.orientation else turned
    shape, affine = _grid(turned, how)
    array = resampled(turned.array, turned.affine, shape, affine, order=0)
    return np.ascontiguousarray(array.transpose(_axes(affine, how)))


def onto_scan(values: np.ndarray, affine: np.ndarray, scan: Scan) -> np.ndarray:
    """Bring a map of a network's grid back onto a scan's, linearly between voxels; 0 beyond the grid.

    Args:
        values: (*S), float32, such as one class's probability.
        affine: (4, 4), of that grid.
        scan: gives shape (X, Y, Z) and geometry.

    Returns:
        float32 (X, Y, Z).
    """
    there = (affine, scan.array.shape, scan.affine)
    inside = resampled(np.ones(values.shape, np.float32), *there, order=0, mode="grid-constant")
    return resampled(values, *there, order=1) * inside  # an outermost voxel counts to its own border, undiminished


def resampled(
    array: np.ndarray,
    affine: np.ndarray,
    shape: Sequence[int],
    new_affine: np.ndarray,
    order: int,
    mode: str = "nearest",
) -> np.ndarray:
    """Show an array (X, Y, Z) on another grid; unchanged where the grids agree.

    Args:
        array: values at the voxels' centres.
        affine: (4, 4), from its indices to mm.
        shape: of the new grid.
        new_affine: of the new grid.
        order: 0 takes the nearest voxel, 1 is linear.
        mode: beyond the array, scipy.ndimage's: "nearest" repeats its edge, "grid-constant" is 0.
    """
    change = np.linalg.inv(affine) @ new_affine
    matrix, offset = change[:3, :3], change[:3, 3]
    signed = np.abs(matrix).round(6)
    if (np.sort(signed, axis=0) == [[0] * 3, [0] * 3, [1] * 3]).all() and np.allclose(
        offset, offset.round(), atol=1e-4
    ):
        array, matrix, offset = _turned(array, matrix.round(), offset.round())
        if tuple(array.shape) == tuple(shape) and (offset == 0).all():
            return array
    if np.allclose(matrix, np.diag(np.diag(matrix)), atol=1e-9):
        matrix = np.diag(matrix)  # scipy then works axis by axis
    return ndimage.affine_transform(array, matrix, offset, output_shape=tuple(shape), order=order, mode=mode)


def _turned(array: np.ndarray, matrix: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Swap and flip an array's axes as a matrix of 0, 1, -1 says; what remains is the offset of the new first voxel."""
    source = np.abs(matrix).argmax(axis=0)  # of each new axis
    signs = matrix[source, range(3)]
    start = np.where(signs < 0, [array.shape[axis] - 1 for axis in source], 0)
    turned = np.flip(array.transpose(source), [k for k in range(3) if signs[k] < 0])
    return np.ascontiguousarray(turned), np.eye(3), (offset[source] - start) * signs


def normalised(array: np.ndarray, how: Normalisation, scan: Scan, trust_hu: bool = False) -> np.ndarray:
    """Bring intensities into a network's range, float32.

    Raises:
        UserError: a "ct" without soft tissue, which is then no CT in HU.
    """
    if how == "ct":
        low, high = WINDOW_HU
        inside = float(((array > low) & (array < high)).mean())
        if not trust_hu and (array.min() >= 0 or inside < 0.01):
            raise UserError(
                f"{scan.path} is no CT in HU: it reaches from {array.min():g} to {array.max():g}, {100 * inside:.1f} % "
                f"of it within {low:g} to {high:g}; give the CT itself, or, if it is in HU after "
                "all, --trust_hu."
            )
        return ((np.clip(array, low, high) - low) / (high - low)).astype(np.float32)
    values = array.astype(np.float64)
    low, scale = (values.mean(), values.std()) if how == "zscore" else (values.min(), np.ptp(values))
    return ((values - low) / scale).astype(np.float32)


def label_box(label: np.ndarray) -> Box:
    """Return the box of a label's foreground; it has some."""
    box = []
    for axis in range(label.ndim):
        filled = np.flatnonzero(label.any(axis=tuple(a for a in range(label.ndim) if a != axis)))
        box.append((int(filled[0]), int(filled[-1]) + 1))
    return tuple(box)


def with_margins(box: Box, margins: Sequence[tuple[int, int]], shape: Sequence[int]) -> Box:
    """Widen a box by voxels before and after, as far as the array reaches."""
    sides = zip(box, margins, shape, strict=True)
    return tuple((max(first - m[0], 0), min(end + m[1], side)) for (first, end), m, side in sides)


def at_least(box: Box, least: Sequence[int], shape: Sequence[int]) -> Box:
    """Widen a box to a least length of its sides, evenly, and at the array's edge on the other side."""
    widened = []
    for (first, end), length, side in zip(box, least, shape, strict=True):
        length = min(max(length, end - first), side)
        first = min(max(first - (length - (end - first)) // 2, 0), side - length)
        widened.append((first, first + length))
    return tuple(widened)


def _grid(scan: Scan, how: Preprocessing) -> tuple[tuple[int, ...], np.ndarray]:
    """Return shape and affine of the grid to which a turned scan is resampled; both grids have the same centre."""
    if how.spacing_mm is None:
        return scan.array.shape, scan.affine
    sides = scan.spacing_mm
    if not how.trust_slice_spacing:
        across = min((2, 1, 0), key=lambda axis: abs(np.subtract(*np.log(np.delete(sides, axis)))))
        sides = tuple(sides[across - 1] if axis == across else side for axis, side in enumerate(sides))
    ratio = np.divide(how.spacing_mm, sides)  # new step in old voxels
    shape = tuple(max(1, round(n / r)) for n, r in zip(scan.array.shape, ratio, strict=True))
    first = ((np.array(scan.array.shape) - 1) - (np.array(shape) - 1) * ratio) / 2
    step = np.eye(4)
    step[:3, :3], step[:3, 3] = np.diag(ratio), first
    return shape, scan.affine @ step


def _axes(affine: np.ndarray, how: Preprocessing) -> tuple[int, ...]:
    """Return the order of (x, y, z) in the layout; slices lie across the longest voxel side, the last of equal ones."""
    if how.layout == "volume":
        return (0, 1, 2)
    sides = np.linalg.norm(affine[:3, :3], axis=0).round(3)
    across = max(range(3), key=lambda axis: (sides[axis], axis))
    return (across, *(axis for axis in (2, 1, 0) if axis != across))


def _permuted(affine: np.ndarray, order: Sequence[int]) -> np.ndarray:
    return affine[:, [*order, 3]]
