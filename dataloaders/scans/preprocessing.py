"""From a scan in space to a network's input, and from its probabilities back onto the scan."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import nibabel
import numpy as np
from scipy import ndimage

from dataloaders.scans.hounsfield import WINDOW_HU, hu_fault
from dataloaders.scans.reading import Scan
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

Axis = Literal["x", "y", "z"]
AXES: tuple[Axis, ...] = ("x", "y", "z")
SAME_SIDE = 0.01  # relative difference up to which two voxel sides count as equal
Normalisation = Literal["zscore", "minmax", "ct"]
_NORMALISATIONS = Normalisation.__args__
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Preprocessing:
    """How a raw scan becomes a network's input; each converted file and each run's config.json keep it.

    Attributes:
        normalise: "zscore" (zero mean, unit variance over the scan), "minmax" ([0, 1] over the scan) or "ct" (HU
            clipped to WINDOW_HU, mapped to [0, 1]); of several channels one for all, or one for each.
        orientation: where the array's axes point, such as "LPS"; None: as the scan is stored.
        spacing_mm: voxel sides after resampling, in the array's axes; None: the scan's own.
        trust_slice_spacing: False resamples as if slices were as far apart as their pixels, the published way of
            Pancreas; slices lie across the axis whose voxel side is unlike the other two.
        layout: "volume" (X, Y, Z), or "slices" (slices, rows, columns).
        slice_axis: of the oriented array, across which the slices lie; None, in files and runs made before there was
            such a field: across each scan's own axis with the longest voxel side.
        channels: names of several channels, in their order; empty: one, which needs no name.
    """

    normalise: Normalisation | tuple[Normalisation, ...]
    orientation: str | None = "LPS"
    spacing_mm: tuple[float, float, float] | None = None
    trust_slice_spacing: bool = True
    layout: Literal["volume", "slices"] = "volume"
    slice_axis: Axis | None = None
    channels: tuple[str, ...] = ()

    @property
    def rules(self) -> tuple[Normalisation, ...]:
        """Return the rule of each channel."""
        return (self.normalise,) * max(len(self.channels), 1) if isinstance(self.normalise, str) else self.normalise

    def of_channel(self, index: int) -> "Preprocessing":
        """Return what one channel goes through."""
        return dataclasses.replace(self, normalise=self.rules[index], channels=())

    def to_json(self) -> str:
        """Return the fields as JSON, the same text for the same fields; of one channel without their names."""
        fields = dataclasses.asdict(self)
        return json.dumps(fields if self.channels else {name: v for name, v in fields.items() if name != "channels"})

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Preprocessing":
        """Make it of what to_json() wrote, read back; a field that was not there yet gets its default.

        Raises:
            ValueError: the fields are not these.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or not set(fields) <= names:
            raise ValueError(f"{fields} is no preprocessing, which has {', '.join(sorted(names))}")
        if not isinstance(fields.get("orientation", "LPS"), (str, type(None))):
            raise ValueError(f"{fields['orientation']!r} is no orientation, which is three letters such as LPS")
        if fields.get("slice_axis") not in (None, *AXES):
            raise ValueError(f"{fields['slice_axis']!r} is no slicing axis, which is x, y or z")
        spacing, channels = fields.get("spacing_mm"), tuple(fields.get("channels") or ())
        normalise = fields.get("normalise")
        rules = tuple(normalise) if isinstance(normalise, (list, tuple)) else normalise
        each = rules if isinstance(rules, tuple) else (rules,)
        if not each or not set(each) <= set(_NORMALISATIONS) or (rules is each and len(rules) != len(channels)):
            raise ValueError(f"{normalise!r} is not {' or '.join(_NORMALISATIONS)}, for all channels or for each")
        is_named = all(isinstance(name, str) for name in channels) and len(set(channels)) == len(channels)
        if not is_named or len(channels) == 1:
            raise ValueError(f"{list(channels)} are not the different names of several channels")
        changed = {"spacing_mm": None if spacing is None else tuple(spacing), "channels": channels, "normalise": rules}
        return cls(**fields | changed)


@dataclass(frozen=True)
class Prepared:
    """A preprocessed scan.

    Attributes:
        array: float32, (X, Y, Z) or (slices, rows, columns), behind the channels where there are several; or a label
            map, uint8.
        affine: (4, 4), from the array's indices to mm, RAS+.
    """

    array: np.ndarray
    affine: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the sides of the grid in space, in voxels."""
        return self.array.shape[-3:]

    def cropped(self, box: Box) -> "Prepared":
        """Return the part inside a box ((first, end) of each axis)."""
        affine = self.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ [first for first, _ in box]
        return Prepared(self.array[(..., *(slice(*side) for side in box))], affine)


def prepare_channels(
    channels: Sequence[Scan], how: Preprocessing, trust_hu: bool = False, tell: bool = True
) -> Prepared:
    """Do what prepare() does with each channel of a case, by its own rule; they lie on one grid.

    Raises:
        UserError: see prepare(), or there are not as many channels as there should be.
    """
    if len(channels) != len(how.rules):
        raise UserError(
            f"{channels[0].path} has {len(channels)} channels where {len(how.rules)} are needed"
            f"{f' ({_names(how.channels)})' if how.channels else ''}: give as many."
        )
    empty = {k for k, scan in enumerate(channels) if scan.array.min() == scan.array.max()}  # colours of a picture alone
    empty = set() if len(empty) == len(channels) else empty  # then prepare() refuses the first
    for k in empty:
        LOGGER.info("NOTE: %s: its channel %s holds one value and becomes 0", channels[k].path, how.channels[k])
    done = {
        k: prepare(scan, how.of_channel(k), trust_hu, tell and k == 0)
        for k, scan in enumerate(channels)
        if k not in empty
    }
    first = next(iter(done.values()))
    if len(channels) == 1:
        return first
    arrays = [done[k].array if k in done else np.zeros_like(first.array) for k in range(len(channels))]
    return Prepared(np.stack(arrays), first.affine)


def prepare(scan: Scan, how: Preprocessing, trust_hu: bool = False, tell: bool = True) -> Prepared:
    """Bring an image of one channel into a network's axes, voxels and range.

    Args:
        scan: as it was read.
        how: what to do to it.
        trust_hu: somebody says that this "ct" is in HU, however it looks.
        tell: log where the scan was itself sliced across another axis than its slices will lie, or cannot be turned.

    Raises:
        UserError: it does not suit what is to be done: see normalised(), check_slicing() and _grid().
    """
    turned = scan.oriented(how.orientation) if how.orientation else scan
    if tell and how.orientation is None:
        LOGGER.info(
            "%s is taken with its axes as stored, %s: the training files do not say where theirs point",
            scan.path, scan.orientation,
        )  # fmt: skip
    check_slicing(turned, how, tell)
    shape, affine = _grid(turned, how)
    values = resampled(turned.array, turned.affine, shape, affine, order=1)
    order = _axes(turned, affine, shape, how)
    array = normalised(values, how.normalise, scan, trust_hu)
    return Prepared(np.ascontiguousarray(array.transpose(order)), _permuted(affine, order))


def prepare_label(label: np.ndarray, image: Scan, how: Preprocessing) -> np.ndarray:
    """Bring a label map (X, Y, Z), on its image's grid, where prepare() brings the image; the nearest voxel decides."""
    turned = dataclasses.replace(image, array=label)
    turned = turned.oriented(how.orientation) if how.orientation else turned
    shape, affine = _grid(turned, how)
    array = resampled(turned.array, turned.affine, shape, affine, order=0)
    return np.ascontiguousarray(array.transpose(_axes(turned, affine, shape, how)))


def own_slice_axis(shape: Sequence[int], sides: Sequence[float]) -> int | None:
    """Return the axis across which a scan was sliced, as its grid tells.

    Args:
        shape: voxels along x, y and z.
        sides: of a voxel along them, in any unit.

    Returns:
        The axis of the only slice; else the one whose side is unlike the two others, which are alike; else that of the
        longest side; None where all are alike.
    """
    single = [axis for axis in range(3) if shape[axis] == 1]
    if len(single) == 1:
        return single[0]
    logs = np.log(sides)
    alike = [axis for axis in range(3) if abs(np.subtract(*np.delete(logs, axis))) < SAME_SIDE]
    if len(alike) == 3:
        return None
    return alike[0] if alike else int(np.argmax(logs))


def check_slicing(turned: Scan, how: Preprocessing, tell: bool) -> None:
    """Refuse a scan of one slice across another axis than the data set's, and say where a stack lies across another.

    Raises:
        UserError: the slices would be strips.
    """
    if how.layout != "slices":
        return
    own = own_slice_axis(turned.array.shape, turned.spacing_mm)
    if how.slice_axis is None or own is None or AXES[own] == how.slice_axis:
        return
    if turned.array.shape[own] == 1:
        raise UserError(
            f"{turned.path} is a single slice across {AXES[own]}, but slices lie across {how.slice_axis} here: leave "
            f"it out, or make a data set with --slice_axis {AXES[own]}."
        )
    if tell:
        LOGGER.info(
            "%s was itself sliced across %s (voxels of %s mm); its slices here lie across %s, as in the whole data set",
            turned.path, AXES[own], _times(turned.spacing_mm), how.slice_axis,
        )  # fmt: skip


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
        corner = offset.astype(int)
        if (corner >= 0).all() and (corner + shape <= array.shape).all():
            part = tuple(slice(first, first + n) for first, n in zip(corner, shape, strict=True))
            return np.ascontiguousarray(array[part])
        array = np.ascontiguousarray(array)
    if np.allclose(matrix, np.diag(np.diag(matrix)), atol=1e-9):
        matrix = np.diag(matrix)  # scipy then works axis by axis
    return ndimage.affine_transform(array, matrix, offset, output_shape=tuple(shape), order=order, mode=mode)


def _turned(array: np.ndarray, matrix: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Swap and flip an array's axes as a matrix of 0, 1, -1 says; what remains is the offset of the new first voxel."""
    source = np.abs(matrix).argmax(axis=0)  # of each new axis
    signs = matrix[source, range(3)]
    start = np.where(signs < 0, [array.shape[axis] - 1 for axis in source], 0)
    turned = np.flip(array.transpose(source), [k for k in range(3) if signs[k] < 0])
    return turned, np.eye(3), (offset[source] - start) * signs


def normalised(array: np.ndarray, how: Normalisation, scan: Scan, trust_hu: bool = False) -> np.ndarray:
    """Bring intensities into a network's range, float32.

    Args:
        array: the scan's values, resampled.
        how: see Preprocessing.
        scan: for the message.
        trust_hu: see prepare().

    Raises:
        UserError: a "ct" without air and soft tissue, which is then no CT in HU; or all values are equal.
    """
    if how == "ct":
        low, high = WINDOW_HU
        fault = "" if trust_hu else hu_fault(array)
        if fault:
            raise UserError(
                f"{scan.path} is no CT in HU: it reaches from {array.min():g} to {array.max():g}, {fault}; give the CT "
                "itself, or, if it is in HU after all, --trust_hu."
            )
        clipped = np.clip(array, low, high).astype(np.float32, copy=False)
        clipped -= low  # in place: a whole scan is large
        clipped /= high - low
        return clipped
    values = array.astype(np.float64)
    low, scale = (values.mean(), values.std()) if how == "zscore" else (values.min(), np.ptp(values))
    if not scale > 0:
        raise UserError(
            f"{scan.path} holds one value, {values.flat[0]:g}, when it is resampled to {_times(array.shape)} voxels: "
            "choose finer voxels (--spacing_mm of the import), or leave the scan out."
        )
    values -= low
    values /= scale
    return values.astype(np.float32)


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
    # A single slice has no neighbour to make others from: it stays one, as thick as it is.
    ratio = np.where(np.equal(scan.array.shape, 1), 1.0, np.divide(how.spacing_mm, sides))  # new step in old voxels
    shape = tuple(max(1, round(n / r)) for n, r in zip(scan.array.shape, ratio, strict=True))
    for axis, (before, now) in enumerate(zip(scan.array.shape, shape, strict=True)):
        if now == 1 < before:
            raise UserError(
                f"{scan.path}: its {before} voxels of {sides[axis]:.3g} mm along {AXES[axis]} shrink to one of "
                f"{how.spacing_mm[axis]:g} mm: choose finer voxels (--spacing_mm of the import), or leave the scan out."
            )
    first = ((np.array(scan.array.shape) - 1) - (np.array(shape) - 1) * ratio) / 2
    step = np.eye(4)
    step[:3, :3], step[:3, 3] = np.diag(ratio), first
    return shape, scan.affine @ step


def _axes(turned: Scan, affine: np.ndarray, shape: Sequence[int], how: Preprocessing) -> tuple[int, ...]:
    """Return the order of (x, y, z) in the layout, slices first; what is left runs from z to x."""
    if how.layout == "volume":
        return (0, 1, 2)
    if how.slice_axis is not None:
        across = AXES.index(how.slice_axis)
    else:
        single = [axis for axis in range(3) if shape[axis] == 1]
        sides = nibabel.affines.voxel_sizes(affine).round(3)
        across = single[0] if len(single) == 1 else max(range(3), key=lambda axis: (sides[axis], axis))
        if turned.array.dtype.kind == "f":  # once a case, for its image
            LOGGER.info(
                "%s: its slices lie across %s, by its own voxels: the training files do not say how theirs lie",
                turned.path, AXES[across],
            )  # fmt: skip
    return (across, *(axis for axis in (2, 1, 0) if axis != across))


def _names(channels: Sequence[str]) -> str:
    return ", ".join(channels)


def _times(values: Sequence[float]) -> str:
    return "×".join(f"{value:.4g}" for value in values)


def _permuted(affine: np.ndarray, order: Sequence[int]) -> np.ndarray:
    return affine[:, [*order, 3]]
