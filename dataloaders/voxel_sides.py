"""Voxel sides as the networks see them, and warnings where those of a scan are unlike those of training."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.files import read_shape, read_spacing

TOLERANCE = 1.25  # a ratio of sides beyond it changes how large a structure looks


@dataclass(frozen=True)
class SideRange:
    """The smallest and largest voxel sides of a run's training cases.

    Attributes:
        low, high: in mm along each axis that the networks see; see seen_sides().
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, sides: Iterable[Sequence[float]]) -> "SideRange | None":
        """Return the range of the sides of several cases, or None of none."""
        table = np.array(list(sides))
        return cls(tuple(table.min(axis=0).tolist()), tuple(table.max(axis=0).tolist())) if table.size else None

    @classmethod
    def from_dict(cls, fields: Any) -> "SideRange | None":
        """Read what a run's config.json keeps; None of a run that kept nothing, or nothing sound."""
        try:
            low, high = (tuple(float(side) for side in fields[name]) for name in ("low", "high"))
        except (KeyError, TypeError, ValueError):
            return None
        return cls(low, high) if len(low) == len(high) else None

    def is_unlike(self, sides: Sequence[float]) -> bool:
        """Tell whether a scan's sides lie clearly beyond those of training."""
        pairs = zip(sides, self.low, self.high, strict=True)
        return any(side > high * TOLERANCE or side * TOLERANCE < low for side, low, high in pairs)

    def __str__(self) -> str:
        """Return the range as text, in mm."""
        pairs = zip(self.low, self.high, strict=True)
        return "×".join(f"{low:.3g}" if np.isclose(low, high) else f"{low:.3g}-{high:.3g}" for low, high in pairs)


def seen_sides(shape: Sequence[int], spacing: Sequence[float], patch_size: Sequence[int]) -> tuple[float, ...]:
    """Return the voxel sides in mm that the networks see.

    Args:
        shape: voxels along the array's last three axes, of slices (slices, rows, columns).
        spacing: voxel sides in mm along these axes.
        patch_size: of the run. In 3D windows have the scan's own voxels. In 2D each slice is resized to it.
    """
    if len(patch_size) == 3:
        return tuple(float(side) for side in spacing)
    pairs = zip(shape[-2:], spacing[-2:], patch_size, strict=True)
    return tuple(float(count * side / size) for count, side, size in pairs)


def range_of_files(paths: Iterable[Path], patch_size: Sequence[int]) -> SideRange | None:
    """Return the range of the sides of converted cases; those that are missing or give no spacing do not count."""
    sides = []
    for path in paths:
        spacing = read_spacing(path) if path.exists() else None
        if spacing is not None and len(spacing) == 3:
            sides.append(seen_sides(read_shape(path), spacing, patch_size))
    return SideRange.of(sides)


def unlike_cases(spacings: Mapping[str, Sequence[float]]) -> str:
    """Return a warning where the voxel sides of a data set's volumes differ much from case to case, or "".

    Args:
        spacings: voxel sides in mm of each case, along the same axes.
    """
    names = list(spacings)
    table = np.array([spacings[name] for name in names])
    if len(names) < 2 or table.ndim != 2:
        return ""
    axis = int(np.argmax(table.max(axis=0) / table.min(axis=0)))
    low, high = int(table[:, axis].argmin()), int(table[:, axis].argmax())
    if table[high, axis] <= table[low, axis] * TOLERANCE:
        return ""
    return (
        f"voxel sides differ by case, from {table[low, axis]:.3g} mm ({names[low]}) to {table[high, axis]:.3g} mm "
        f"({names[high]}), and the networks see voxels only: import with --spacing_mm to make them alike"
    )
