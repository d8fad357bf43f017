"""The one axis across which all slices of a data set lie, chosen by its scans' headers before anything is converted."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np

from dataloaders.scans.preprocessing import AXES, Axis, own_slice_axis
from dataloaders.scans.reading import NIFTI, Scan, read_scan
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

Grid = tuple[tuple[int, ...], tuple[float, ...]]  # voxels and their sides, along the patient's x, y and z


def grid_of(path: Path, read: Callable[[Path], Scan] = read_scan) -> Grid:
    """Return a scan's voxels and their sides along x (right to left), y (front to back) and z; of NIfTI by its header.

    Raises:
        UserError: see read_scan().
    """
    shape = affine = None
    if path.name.lower().endswith(NIFTI):
        try:
            image = nibabel.load(path)
            shape, affine = image.shape[:3], image.affine
        except Exception:  # noqa: BLE001 - read_scan() says what is the matter with it
            shape = None
    if shape is None or len(shape) != 3:
        scan = read(path)
        shape, affine = scan.array.shape, scan.affine
    axes = nibabel.orientations.io_orientation(affine)[:, 0]
    sides = nibabel.affines.voxel_sizes(affine)
    along = [int(np.flatnonzero(axes == world)[0]) for world in range(3)] if np.isfinite(axes).all() else [0, 1, 2]
    return tuple(int(shape[axis]) for axis in along), tuple(float(sides[axis]) for axis in along)


def choose_slice_axis(
    scans: Mapping[str, Path],
    given: Axis | None,
    spacing_mm: Sequence[float] | None,
    workers: int,
    read: Callable[[Path], Scan] = read_scan,
) -> Axis:
    """Return the axis across which the slices of all scans lie, and say why.

    Args:
        scans: case to file.
        given: --slice_axis, or what an earlier import of these data chose; None: what the scans themselves say.
        spacing_mm: voxel sides after resampling, or None.
        workers: files at a time.
        read: reads what has no header that can be read alone.

    Raises:
        UserError: scans disagree and nothing was given; or a single slice lies across another axis.
    """
    with ThreadPoolExecutor(workers) as pool:
        grids = dict(zip(scans, pool.map(lambda path: grid_of(path, read), scans.values()), strict=True))
    own = {name: _axis(shape, sides, spacing_mm) for name, (shape, sides) in grids.items()}
    first: dict[Axis, str] = {}
    for name, axis in own.items():
        if axis is not None:
            first.setdefault(axis, name)
    if given is None and len(first) > 1:
        (one, a), (other, b), *_ = first.items()
        raise UserError(
            f"{scans[a]} ({_text(*grids[a])}) is sliced across {one}, {scans[b]} ({_text(*grids[b])}) across {other}: "
            f"give --slice_axis {one} or {other} for all, or import them apart."
        )
    chosen = given or next(iter(first), "z")
    for name, axis in own.items():
        if axis not in (None, chosen) and grids[name][0][AXES.index(axis)] == 1:
            raise UserError(
                f"{scans[name]} is a single slice across {axis}, not {chosen}: leave it out, or give "
                f"--slice_axis {axis} for all scans."
            )
    others = sum(axis not in (None, chosen) for axis in own.values())
    singles = sum(shape[AXES.index(chosen)] == 1 for shape, _ in grids.values())
    LOGGER.info(
        "slices lie across %s in every case%s%s", chosen,
        f"; {others} of {len(own)} scans were themselves sliced across another axis" if others else "",
        f"; {singles} scans are a single slice" if singles else "",
    )  # fmt: skip
    return chosen


def _axis(shape: Sequence[int], sides: Sequence[float], spacing_mm: Sequence[float] | None) -> Axis | None:
    """Return a scan's own slicing axis, after resampling to sides that are not all alike theirs."""
    single = 1 in shape
    after = own_slice_axis((2, 2, 2), spacing_mm) if spacing_mm is not None and not single else None
    own = own_slice_axis(shape, sides) if after is None else after
    return None if own is None else AXES[own]


def _text(shape: Sequence[int], sides: Sequence[float]) -> str:
    return f"{'×'.join(map(str, shape))} voxels of {'×'.join(f'{side:.3g}' for side in sides)} mm"
