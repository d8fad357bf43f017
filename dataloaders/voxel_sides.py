"""Voxel sides as the networks see them, and warnings where those of a scan are unlike those of training."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.files import read_shape, read_spacing

# Ratios beyond which structures look clearly larger or smaller to the networks. Fields of view of slices, which are
# resized to one size, vary more from case to case than voxel sides do.
TOLERANCE, TOLERANCE_2D = 1.25, 1.5


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
        bound = TOLERANCE if len(self.low) == 3 else TOLERANCE_2D
        pairs = zip(sides, self.low, self.high, strict=True)
        return any(side > high * bound or side * bound < low for side, low, high in pairs)

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
    return SideRange.of(filter(None, (_sides_of_file(path, patch_size) for path in paths)))


def _sides_of_file(path: Path, patch_size: Sequence[int]) -> tuple[float, ...] | None:
    """Return the sides that the networks see of a converted case; None if it is missing or gives no spacing."""
    spacing = read_spacing(path) if path.exists() else None
    if spacing is None or len(spacing) != 3:
        return None
    return seen_sides(read_shape(path), spacing, patch_size)


def unlike_cases(files: Mapping[str, Path], is_3d: bool) -> str:
    """Return a warning if the cases of a data set differ in size as the networks see them, or "".

    Args:
        files: the converted case of each name; those that give no spacing do not count.
        is_3d: the networks see voxels; else slices that are resized to one size.
    """
    lengths: dict[str, tuple[float, ...]] = {}
    for name, path in files.items():
        if sides := _sides_of_file(path, (1, 1, 1) if is_3d else (1, 1)):
            lengths[name] = sides
    if len(lengths) < 2:
        return ""
    names, table = list(lengths), np.array(list(lengths.values()))
    axis = int(np.argmax(table.max(axis=0) / table.min(axis=0)))
    low, high = int(table[:, axis].argmin()), int(table[:, axis].argmax())
    if table[high, axis] <= table[low, axis] * (TOLERANCE if is_3d else TOLERANCE_2D):
        return ""
    what = "voxel sides" if is_3d else "the sizes of slices"
    why = "the networks see voxels only: import with --spacing_mm to make them alike"
    why = why if is_3d else "each slice is resized to --patch_size: crop or pad the scans to make them alike"
    return (
        f"{what} differ by case, from {table[low, axis]:.3g} mm ({names[low]}) to {table[high, axis]:.3g} mm "
        f"({names[high]}), and {why}"
    )
