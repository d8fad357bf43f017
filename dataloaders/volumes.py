"""Cropped 3D training volumes and whole evaluation volumes; what LA and Pancreas share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from dataloaders.files import Cache, read_sample, read_spacing
from sdcl.errors import UserError
from sdcl.evaluation import Case

Crop = Literal["random", "centre"]


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

    Source: method.md, "Order of the data", random crop and centre crop.
    """
    sides = list(zip(shape, patch_size, strict=True))
    is_small = any(side <= patch for side, patch in sides)
    pads = [max((patch - side) // 2 + 1, 0) if is_small else 0 for side, patch in sides]
    rooms = [side + 2 * pad - patch for (side, patch), pad in zip(sides, pads, strict=True)]
    corner = [round(room / 2) if rng is None else int(rng.integers(room)) for room in rooms]
    return pads, corner


def cropped(array: np.ndarray, pads: Sequence[int], corner: Sequence[int], patch_size: Sequence[int]) -> np.ndarray:
    """Return the crop of crop_corner(); what lies outside the volume is 0."""
    result = np.zeros(tuple(patch_size), array.dtype)
    source, target = [], []
    for pad, start, patch, side in zip(pads, corner, patch_size, array.shape, strict=True):
        begin, end = max(start - pad, 0), min(start - pad + patch, side)
        source.append(slice(begin, end))
        target.append(slice(begin - (start - pad), end - (start - pad)))
    result[tuple(target)] = array[tuple(source)]
    return result


class CroppedVolumes:
    """Training volumes, decoded once, cropped at each reading.

    Args:
        paths: the files.
        patch_size: sides of the samples, in voxels.
        crop: "random" or "centre".
        num_classes: labels must lie in [0, num_classes).
        cache_gb: bound of the memory for decoded volumes, in GiB.
        cache_dtype: "float32", or "float16" for half the memory at 3 decimal digits.
        labelled: without it labels are neither needed nor read.

    Raises:
        UserError: a file is missing or wrong.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        patch_size: Sequence[int],
        crop: Crop,
        num_classes: int,
        cache_gb: float,
        cache_dtype: Literal["float32", "float16"],
        labelled: bool,
    ):
        self._patch_size, self._crop = tuple(patch_size), crop
        self._cache = Cache(
            paths,
            what=f"{'labelled' if labelled else 'unlabelled'} volumes",
            bound_gb=cache_gb,
            ndim=3,
            num_classes=num_classes,
            needs_label=labelled,
            dtype=cache_dtype,
        )

    def __len__(self) -> int:
        """Count the volumes."""
        return len(self._cache)

    def sample(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a crop: image (X, Y, Z) float32 and label (X, Y, Z) uint8, or None without labels."""
        case = self._cache[index]
        where = crop_corner(case.image.shape, self._patch_size, rng if self._crop == "random" else None)
        image = cropped(case.image, *where, self._patch_size).astype(np.float32, copy=False)
        return image, None if case.label is None else cropped(case.label, *where, self._patch_size)


def read_volumes(
    names: Sequence[str], path_of: Callable[[str], Path], num_classes: int, spacing: Sequence[float] | None = None
) -> list[Case]:
    """Read whole labelled volumes.

    Args:
        names: cases.
        path_of: a case's file.
        num_classes: labels must lie in [0, num_classes).
        spacing: voxel sides in mm; None: each file's own attribute `spacing`, where it has one.

    Raises:
        UserError: a file is missing or wrong.
    """
    cases = []
    for name in names:
        sample = read_sample(path_of(name), ndim=3, num_classes=num_classes)
        cases.append(Case(name, sample.image, sample.label, tuple(spacing) if spacing else read_spacing(path_of(name))))
    return cases


def split_labelled(train: Sequence[str], labelnum: int, val_cases: int = 0) -> tuple[list[str], list[str], list[str]]:
    """Split the training list into its first cases, labelled, the rest, and the cases held out for validation.

    Args:
        train: case names.
        labelnum: number of labelled cases; at least 2, since two of them are mixed.
        val_cases: how many to hold out, the last of the unlabelled ones.

    Returns:
        Labelled, unlabelled and validation names, in the list's order.

    Raises:
        UserError: the list does not have so many.
    """
    if not 2 <= labelnum <= len(train):
        raise UserError(f"--labelnum is {labelnum}: choose 2 to {len(train)}, the cases of train.txt.")
    rest = list(train[labelnum:])
    if val_cases and val_cases >= len(rest):
        raise UserError(
            f"--val_cases is {val_cases}, but only {len(rest)} training cases are unlabelled: hold out fewer."
        )
    return list(train[:labelnum]), rest[: len(rest) - val_cases], rest[len(rest) - val_cases :]
