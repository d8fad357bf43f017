"""What prediction writes: NIfTI images of one geometry, and a table of volumes that grows."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from scipy import ndimage

from dataloaders.scans.reading import GEOMETRY_TOLERANCE, Scan, corner_offset_mm
from sdcl.runs.atomic import locked, replacing, write_text
from sdcl.runs.errors import UserError
from sdcl.runs.written_files import check_replaceable, is_recorded

VOLUMES = "volumes.csv"
COLUMNS = ("scan", "structure", "volume_ml", "voxels", "weights")
EXACT_MM = 1e-3  # what float32 loses in a quaternion


def straightened(affine: np.ndarray) -> np.ndarray:
    """Return the affine without shear that is nearest to one, with the same voxel sides and first voxel."""
    image = nibabel.Nifti1Image(np.zeros((1, 1, 1), np.uint8), None)
    image.set_qform(affine, code=1)
    result = np.array(image.get_qform(), float)
    sides, old = nibabel.affines.voxel_sizes(result), nibabel.affines.voxel_sizes(affine)
    result[:3, :3] *= old / sides
    return result


def is_sheared(scan: Scan) -> bool:
    """Tell whether a scan's axes are so far from perpendicular that no grid of perpendicular axes places its voxels."""
    straight = Scan(scan.path, scan.array, straightened(scan.affine))
    return corner_offset_mm(scan, straight) > GEOMETRY_TOLERANCE * min(scan.spacing_mm)


def upright(scan: Scan) -> tuple[Scan, np.ndarray]:
    """Resample a sheared scan, as a tilted gantry makes them, onto the perpendicular grid round it.

    Slices stay as far apart, one behind the other along the line of their first voxels; sides stay as they are.

    Returns:
        The scan on its new grid, linear between voxels and its lowest value beyond it; and where it was, bool.
    """
    _, back = np.linalg.qr(scan.affine[:3, [2, 0, 1]])  # z first, so that its direction stays
    directions = scan.affine[:3, [2, 0, 1]] @ np.linalg.inv(back) * np.sign(np.diag(back))
    grid = scan.affine.copy()
    grid[:3, :3] = directions[:, [1, 2, 0]] * scan.spacing_mm
    corners = np.stack(np.meshgrid(*[(0, side - 1) for side in scan.array.shape], indexing="ij"), -1).reshape(-1, 3)
    there = nibabel.affines.apply_affine(np.linalg.inv(grid) @ scan.affine, corners)
    first, last = np.floor(there.min(axis=0) + 0.01), np.ceil(there.max(axis=0) - 0.01)
    grid[:3, 3] += grid[:3, :3] @ first
    shape = tuple(int(side) + 1 for side in last - first)
    change = np.linalg.inv(scan.affine) @ grid
    how = {"matrix": change[:3, :3], "offset": change[:3, 3], "output_shape": shape, "mode": "grid-constant"}
    array = ndimage.affine_transform(scan.array, order=1, cval=float(scan.array.min()), **how)
    inside = ndimage.affine_transform(np.ones(scan.array.shape, np.uint8), order=0, cval=0, **how)
    return Scan(scan.path, array, grid), inside.astype(bool)


def nifti_like(scan: Scan, array: np.ndarray) -> nibabel.Nifti1Image:
    """Make a NIfTI image in mm on a scan's grid, with the scan's own header where it is a NIfTI file.

    Its qform and sform say the same; where a qform cannot, for shear, its code is 0.
    """
    code, header = 1, None
    if scan.header is not None:
        header = scan.header.copy()
        code = max(int(header["sform_code"]), 0) or max(int(header["qform_code"]), 0) or 1
        header.set_data_dtype(array.dtype)
        header["cal_min"] = header["cal_max"] = 0  # the scan's display range
        header.set_slope_inter(1, 0)
        header["descrip"] = header["db_name"] = header["aux_file"] = header["intent_name"] = (
            b""  # where converters write a patient's name
        )
        header.extensions.clear()  # and where others keep DICOM headers
    image = type_of(header)(array, scan.affine, header)
    affine, straight = scan.affine, straightened(scan.affine)
    offset = corner_offset_mm(scan, Scan(scan.path, scan.array, straight))
    if EXACT_MM < offset <= GEOMETRY_TOLERANCE * min(scan.spacing_mm):
        affine = straight  # readers choose between the two forms each in their own way
    can_say = offset <= GEOMETRY_TOLERANCE * min(scan.spacing_mm)
    image.set_qform(affine, code=code if can_say else 0)
    image.set_sform(affine, code=code)
    image.header["xyzt_units"] = (int(image.header["xyzt_units"]) & ~7) | 2  # space in mm; time as it was
    return image


def type_of(header: nibabel.Nifti1Header | None) -> type:
    """Return the image class of a header, NIfTI-1 or NIfTI-2."""
    return nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image


def save_nifti_file(image: nibabel.Nifti1Image, path: Path) -> None:
    """Write a .nii.gz file that appears only when complete."""
    with replacing(path) as temporary:
        nibabel.save(image, temporary)


def read_volumes(path: Path) -> list[dict[str, str]]:
    """Read the rows of earlier predictions into the same folder.

    Raises:
        UserError: the file is no table of volumes.
    """
    if not path.exists():
        return []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, strict=True))
        known = (COLUMNS, COLUMNS[:-1])  # earlier versions had no column for the weights
        if not rows or tuple(rows[0]) not in known or any(len(row) != len(rows[0]) for row in rows[1:]):
            raise ValueError("other columns")
    except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(
            f"{path} is no table of volumes that predict.py wrote ({error}): move it away, or choose another --output."
        ) from None
    return [{"weights": ""} | dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def add_volumes(path: Path, rows: Sequence[dict[str, Any]]) -> int:
    """Add rows to the table of volumes, in place of earlier rows of the same scans.

    The table is read again under a lock, so that several predict.py may write into one folder.

    Returns:
        The number of rows of other scans that stay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock")):
        check_volumes(path)
        return write_volumes(path, read_volumes(path), rows)


def check_volumes(path: Path) -> None:
    """Check that a table of volumes is none, or ours and unchanged; one of an earlier version has no record.

    Raises:
        UserError: the table is the user's, or somebody has changed it.
    """
    read_volumes(path)
    if is_recorded(path):
        check_replaceable(path)


def _cell(value: Any) -> Any:
    """Return what stands in a table: six digits of a length, nothing for one that nobody knows."""
    if not isinstance(value, float):
        return value
    return "" if np.isnan(value) else f"{value:.6g}"


def write_volumes(path: Path, earlier: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> int:
    """Write a table of volumes: the earlier rows of other scans, then these; return how many earlier ones stay."""
    now = {row["scan"] for row in rows}
    kept = [row for row in earlier if row["scan"] not in now]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in (*kept, *rows):
        writer.writerow(_cell(row[key]) for key in COLUMNS)
    write_text(path, text.getvalue(), is_known=True)  # its rows are among these
    return len(kept)
