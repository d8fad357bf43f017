"""Raw scans and labels with their geometry: NIfTI, NRRD, MetaImage and DICOM series, every mistake named."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel import orientations

from dataloaders.checks import check_declared
from dataloaders.dicom import check_lengths, dicom_files, is_dicom
from sdcl.errors import UserError
from sdcl.runs import LOGGER

NIFTI = (".nii", ".nii.gz")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
SUFFIXES = (*NIFTI, *ITK)
SIDES_MM = (0.01, 50.0)  # plausible voxel sides; beyond them the header's unit is not the millimetre
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
GEOMETRY_TOLERANCE = 0.1  # of a voxel's smallest side, at the grid's corners
ROUNDING = 1e-3  # up to which a label is the whole number beside it: stored with a slope, 3 comes as 2.9999
GAP_TOLERANCE = 0.1  # of the usual gap between two slices of a DICOM series


@dataclass(frozen=True)
class Scan:
    """A scan or label map in space.

    Attributes:
        path: where it was read.
        array: (X, Y, Z), any real dtype.
        affine: (4, 4), from indices to mm, x to the patient's right-to-left, as NIfTI has it (RAS+).
        header: of a NIfTI file, for what is written onto its grid.
        slice_names: of a DICOM series, its files along z.
    """

    path: Path
    array: np.ndarray
    affine: np.ndarray
    header: nibabel.Nifti1Header | None = None
    slice_names: tuple[str, ...] = ()

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Return the voxel's sides along the array's axes, in mm."""
        return tuple(float(side) for side in nibabel.affines.voxel_sizes(self.affine))

    @property
    def orientation(self) -> str:
        """Return where the array's axes point, such as "LPS": to the left, posterior, superior."""
        return "".join(nibabel.aff2axcodes(self.affine))

    def oriented(self, codes: str) -> "Scan":
        """Return the same scan with its axes swapped and flipped so that they point as the codes say."""
        change = orientations.ornt_transform(
            orientations.io_orientation(self.affine), orientations.axcodes2ornt(tuple(codes))
        )
        array = orientations.apply_orientation(self.array, change)
        affine = self.affine @ orientations.inv_ornt_aff(change, self.array.shape)
        return replace(self, array=array, affine=affine, header=None, slice_names=())


def name_of(path: Path) -> str:
    """Return a scan's name: the file's without its suffix, or the folder's."""
    name = path.name
    suffix = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)] if suffix and path.is_file() else name


def find_scans(folder: Path) -> dict[str, Path]:
    """Find the scans of a folder: its files, else itself as a DICOM series, else each subfolder as one.

    Returns:
        Name to file or DICOM folder, sorted by name.

    Raises:
        UserError: there is none, or two have the same name.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the one that holds the scans.")
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    files = [path for path in entries if path.name.lower().endswith(SUFFIXES)]
    if not files and any(is_dicom(path) for path in entries):
        files = [folder]
    if not files:
        files = [path for path in entries if path.is_dir() and next(dicom_files(path), None)]
    if not files:
        raise UserError(
            f"{folder} holds no scans: expected {', '.join(SUFFIXES)} files or folders of DICOM files there."
        )
    found: dict[str, Path] = {}
    for path in sorted(files):
        if name_of(path) in found:
            raise UserError(
                f"{folder} holds {found[name_of(path)].name} and {path.name}: remove or rename one of them."
            )
        found[name_of(path)] = path
    return found


def read_scan(path: Path) -> Scan:
    """Read an image.

    Args:
        path: a NIfTI, NRRD or MetaImage file, or a folder with a DICOM series.

    Returns:
        The scan; array float32 (X, Y, Z), of a CT in HU.

    Raises:
        UserError: it cannot be read, is not one volume, or holds nan, infinite or only equal values.
    """
    scan = _read(Path(path))
    array = np.ascontiguousarray(scan.array, np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{path} holds nan or infinite values: replace them, or export the scan again.")
    if array.min() == array.max():
        raise UserError(f"{path} holds the value {array.flat[0]:g} alone, no image: export the scan again.")
    return replace(scan, array=array)


def read_label(path: Path, num_classes: int | None = None) -> Scan:
    """Read a label map.

    Args:
        path: see read_scan().
        num_classes: labels must lie in [0, num_classes); None: in [0, 65535].

    Returns:
        The label map; array uint8 (X, Y, Z), or uint16 where it holds values above 255.

    Raises:
        UserError: it cannot be read, or holds something else than classes, or nothing but background.
    """
    label = _read(Path(path))
    top = num_classes or 2**16
    classes = np.unique(label.array)
    whole = np.round(classes)
    wrong = [v for v, w in zip(classes.tolist(), whole, strict=True) if not (abs(v - w) <= ROUNDING and 0 <= w < top)]
    if wrong:
        raise UserError(
            f"{path} holds the label {wrong[0]:g}, outside the classes 0 to {top - 1}: correct it, "
            "or give the file of the labels, not of the image or of probabilities."
        )
    if whole.max() == 0:
        raise UserError(f"{path} is empty, all background: give the case's own label, or leave the case out.")
    dtype = np.uint8 if whole.max() < 256 else np.uint16
    return replace(label, array=np.ascontiguousarray(np.round(label.array), dtype))


def aligned_label(image: Scan, label: Scan) -> np.ndarray:
    """Bring a label onto its image's axes by their headers: swaps and flips alone.

    Returns:
        uint8, of the image's shape.

    Raises:
        UserError: shape or geometry differ; the message says how.
    """
    turned = label.oriented(image.orientation)
    fix = "export both from the same series, or resample the label onto the image"
    if turned.array.shape != image.array.shape:
        raise UserError(
            f"{label.path} has {_times(turned.array.shape)} voxels where {image.path} has {_times(image.array.shape)} "
            f"(both in the axes {image.orientation}): {fix}."
        )
    offset = corner_offset_mm(image, turned)
    if offset > GEOMETRY_TOLERANCE * min(image.spacing_mm):
        raise UserError(
            f"{label.path} lies up to {offset:.3g} mm beside {image.path}, by their headers "
            f"(voxels {_times(turned.spacing_mm)} and {_times(image.spacing_mm)} mm): {fix}."
        )
    return turned.array


def label_by_index(image: Scan, label: Scan, flip: Sequence[int] = ()) -> np.ndarray:
    """Lay a label's array on an image's, flipped along some axes, without a look at its header.

    Returns:
        uint8, of the image's shape.

    Raises:
        UserError: the shapes differ.
    """
    if label.array.shape != image.array.shape:
        raise UserError(
            f"{label.path} has {_times(label.array.shape)} voxels where {image.path} has {_times(image.array.shape)}: "
            "pair the files that belong together."
        )
    return np.flip(label.array, flip)


def corner_offset_mm(first: Scan, second: Scan) -> float:
    """Return the largest distance in mm between the same corner voxels of two scans of the same shape."""
    corners = np.stack(np.meshgrid(*[(0, side - 1) for side in first.array.shape], indexing="ij"), -1).reshape(-1, 3)
    places = [nibabel.affines.apply_affine(scan.affine, corners) for scan in (first, second)]
    return float(np.linalg.norm(places[0] - places[1], axis=1).max())


def _times(values: Sequence[float]) -> str:
    return "×".join(f"{value:.4g}" for value in values)


def _read(path: Path) -> Scan:
    if path.is_dir():
        return _checked(_read_dicom(path))
    if not path.exists():
        raise UserError(f"{path} does not exist: check the path.")
    lower = path.name.lower()
    if lower.endswith(NIFTI):
        return _checked(_guarded(path, _read_nifti))
    if lower.endswith(ITK):
        return _checked(_guarded(path, _read_itk))
    if is_dicom(path):
        raise UserError(f"{path} is one DICOM file of a series: give the folder that holds the series.")
    raise UserError(f"{path} is none of {', '.join(SUFFIXES)}, nor a folder of DICOM files: convert it to NIfTI.")


def _guarded(path: Path, read: Callable[[Path], Scan]) -> Scan:
    """Call a library's reader; a damaged file makes it fail in many ways, all of which mean the same."""
    try:
        return read(path)
    except UserError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1][:160] if lines else type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}): it is damaged or no such file; copy it again.") from None


def _volume_shape(path: Path, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the first three sides, of which no others may be longer than 1."""
    if len(shape) < 3 or any(side != 1 for side in shape[3:]) or 0 in shape:
        raise UserError(f"{path} has the shape {_times(shape)}, it must be one volume of three dimensions: export one.")
    return tuple(shape[:3])


def _read_nifti(path: Path) -> Scan:
    image = nibabel.load(path)
    if not isinstance(image, (nibabel.Nifti1Image, nibabel.Nifti1Pair)):
        raise UserError(f"{path} is no NIfTI file, whatever its name says: convert it.")
    kind = image.get_data_dtype().kind
    if kind not in "fiub":
        raise UserError(f"{path} holds {image.get_data_dtype()} voxels: export it with one number a voxel.")
    shape = _volume_shape(path, image.shape)
    check_declared(path, "its header", image.shape, image.get_data_dtype().itemsize, path.stat().st_size)
    array = np.asanyarray(image.dataobj).reshape(shape)
    return Scan(path, np.array(array), np.asarray(image.affine, float), image.header)


def _read_itk(path: Path) -> Scan:
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetFileName(os.fspath(path))
    reader.ReadImageInformation()
    if reader.GetNumberOfComponents() != 1:
        raise UserError(f"{path} holds {reader.GetNumberOfComponents()} numbers a voxel: export it with one.")
    shape = _volume_shape(path, reader.GetSize())
    is_detached = path.suffix.lower() in (".nhdr", ".mhd")
    stored = sum(p.stat().st_size for p in path.parent.iterdir() if p.is_file()) if is_detached else path.stat().st_size
    check_declared(path, "its header", reader.GetSize(), 1, stored)
    image = reader.Execute()
    image = image[(slice(None),) * 3 + (0,) * (image.GetDimension() - 3)] if image.GetDimension() > 3 else image
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return Scan(path, sitk.GetArrayFromImage(image).T.reshape(shape), LPS_TO_RAS @ affine)


@dataclass(frozen=True)
class _Slice:
    """One DICOM file: its series, its place, its picture's shape and sides; positions in mm, x to the left (LPS)."""

    path: Path
    series: tuple
    position: np.ndarray
    axes: np.ndarray
    sides: tuple[float, float]


def _read_dicom(folder: Path) -> Scan:
    """Read the largest series of a folder, its slices ordered by their positions."""
    groups: dict[tuple, list[_Slice]] = {}
    for path in dicom_files(folder):
        slice_ = _guarded(path, _slice_header)
        if slice_ is not None:
            groups.setdefault(slice_.series, []).append(slice_)
    ranked = sorted(groups.values(), key=len, reverse=True)
    if not ranked or len(ranked[0]) < 2:
        raise UserError(f"{folder} holds no DICOM series of slices: give the folder with the scan's .dcm files.")
    if len(ranked) > 1:
        if len(ranked[1]) == len(ranked[0]):
            raise UserError(
                f"{folder} holds two series of {len(ranked[0])} slices ({ranked[0][0].path.name} is of one, "
                f"{ranked[1][0].path.name} of the other): leave one of them there."
            )
        others = sum(map(len, ranked[1:]))
        LOGGER.info("%s: the series of %d slices; left out %d other files", folder, len(ranked[0]), others)
    slices = ranked[0]
    normal = np.cross(*slices[0].axes)
    slices.sort(key=lambda s: float(s.position @ normal))
    _check_gaps(folder, slices, normal)
    array = np.stack([_guarded(s.path, _slice_pixels) for s in slices], axis=-1)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = slices[0].axes[0] * slices[0].sides[0], slices[0].axes[1] * slices[0].sides[1]
    affine[:3, 2] = (slices[-1].position - slices[0].position) / (len(slices) - 1)  # a tilted gantry's too
    affine[:3, 3] = slices[0].position
    return Scan(folder, array, LPS_TO_RAS @ affine, slice_names=tuple(str(s.path) for s in slices))


def _slice_header(path: Path) -> _Slice | None:
    """Read a file's header; None for what has no place in space."""
    check_lengths(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(os.fspath(path))
    reader.ReadImageInformation()
    tags = {key: reader.GetMetaData(key) for key in ("0020|0032", "0020|0037") if reader.HasMetaDataKey(key)}
    if len(tags) < 2:
        return None
    position, axes = (np.array([float(v) for v in tags[key].split("\\")]) for key in ("0020|0032", "0020|0037"))
    uid = reader.GetMetaData("0020|000e").strip("\0 ") if reader.HasMetaDataKey("0020|000e") else ""
    shape, sides = reader.GetSize()[:2], reader.GetSpacing()[:2]
    check_declared(path, "its header", shape, 1, path.stat().st_size)
    series = (uid, shape, tuple(np.round(axes, 3)), tuple(np.round(sides, 4)))
    return _Slice(path, series, position, axes.reshape(2, 3), sides)


def _slice_pixels(path: Path) -> np.ndarray:
    """Return one slice (X, Y), rescaled to HU for a CT."""
    return sitk.GetArrayFromImage(sitk.ReadImage(os.fspath(path)))[0].T


def _check_gaps(folder: Path, slices: Sequence[_Slice], normal: np.ndarray) -> None:
    """Refuse a series with slices missing, doubled or unevenly spaced."""
    places = np.array([s.position @ normal for s in slices])
    gaps = np.diff(places)
    usual = float(np.median(gaps))
    worst = int(np.abs(gaps - usual).argmax())
    if usual <= 0 or abs(gaps[worst] - usual) > GAP_TOLERANCE * usual:
        raise UserError(
            f"{folder}: {slices[worst].path.name} and {slices[worst + 1].path.name} lie {gaps[worst]:.3g} mm apart, "
            f"other slices {usual:.3g} mm: a slice is missing or doubled; export the series again."
        )


def _checked(scan: Scan) -> Scan:
    """Refuse a geometry that cannot be one."""
    matrix = scan.affine[:3, :3]
    if not np.isfinite(scan.affine).all() or abs(np.linalg.det(matrix)) < 1e-9:
        raise UserError(
            f"{scan.path}: its header gives no usable geometry (affine {matrix.round(3).tolist()}): correct it."
        )
    if not all(SIDES_MM[0] <= side <= SIDES_MM[1] for side in scan.spacing_mm):
        raise UserError(
            f"{scan.path}: its header gives voxels of {_times(scan.spacing_mm)} mm, which no scan has: correct it."
        )
    return scan
