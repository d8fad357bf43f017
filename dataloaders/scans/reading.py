"""Raw scans and labels with their geometry: NIfTI, NRRD, MetaImage, MGH and DICOM series, every mistake named."""

import gzip
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel import orientations

from dataloaders.checks import check_declared, check_is_loaded
from dataloaders.scans.dicom import dicom_files, guarded, is_dicom
from dataloaders.scans.dicom_labels import read_segmentation, segmentation_in
from dataloaders.scans.finding import ITK, MGH, NIFTI, PAIR, suffix_of
from dataloaders.scans.finding import SUFFIXES as SUFFIXES
from dataloaders.scans.finding import find_scans as find_scans
from dataloaders.scans.finding import name_of as name_of
from dataloaders.scans.pictures import AFFINE, is_picture, is_stack, read_mask, read_picture, read_stack
from dataloaders.scans.series import read_series, sort_out, tell_left_out
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

SIDES_MM = (0.01, 50.0)  # plausible voxel sides; beyond them the header's unit is not the millimetre
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
GEOMETRY_TOLERANCE = 0.1  # of a voxel's smallest side, at the grid's corners
UNITS_MM = {"meter": 1000.0, "mm": 1.0, "micron": 0.001}  # that a NIfTI header may name
FEW_LABELS, MOST_LABELS = 8, 256  # different whole numbers of a label map
SHARED = 0.9  # of neighbouring foreground voxels that have one label
SAMPLE = 50_000  # voxels
LENGTHS_MM = {  # that an NRRD or MetaImage header may name
    **dict.fromkeys(("", "?", "mm", "millimeter", "millimetre", "millimeters", "millimetres"), 1.0),
    **dict.fromkeys(("m", "meter", "metre", "meters", "metres"), 1000.0),
    **dict.fromkeys(("dm", "decimeter", "decimetre", "decimeters", "decimetres"), 100.0),
    **dict.fromkeys(("cm", "centimeter", "centimetre", "centimeters", "centimetres"), 10.0),
    **dict.fromkeys(("um", "\u00b5m", "\u03bcm", "micron", "microns", "micrometer", "micrometre", "micrometers",
                     "micrometres"), 1e-3),
    **dict.fromkeys(("nm", "nanometer", "nanometre", "nanometers", "nanometres"), 1e-6),
}  # fmt: skip
MAX_TEXT_HEADER = 2**20  # bytes of an NRRD or MetaImage header
ROUNDING_OF_ONE = 3 * float(np.finfo(np.float32).eps)  # how far a unit quaternion's length may lie from 1
GZIP = b"\x1f\x8b"
# nibabel takes a quaternion that is longer than 1 by less than this for a rotation, and normalises it.
nibabel.Nifti1Header.quaternion_threshold = nibabel.Nifti2Header.quaternion_threshold = -1e-3
ROUNDING = 1e-3  # how far a label may lie from its whole number, after a header's slope and intercept


class ConstantImageError(UserError):
    """A file holds one value throughout, and so no image."""

    def __init__(self, path: Path, value: float):
        super().__init__(f"{path} holds the value {value:g} alone, no image: export the scan again.")
        self.value = value


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


def read_scan(path: Path, *, pixel_spacing_mm: tuple[float, float] | None = None) -> Scan:
    """Read an image.

    Args:
        path: a NIfTI, NRRD, MetaImage or MGH file, a grey picture, a folder with a DICOM series, one of its files, or
            what find_scans() found.
        pixel_spacing_mm: between rows and between columns, for DICOM files without PixelSpacing.

    Returns:
        The scan; array float32 (X, Y, Z), of a CT in HU.

    Raises:
        UserError: it cannot be read, is not one volume, or holds nan, infinite or only equal values.
    """
    scan = _read(path, pixel_spacing_mm)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused
        array = np.ascontiguousarray(scan.array, np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{path} holds nan or infinite values: replace them, or export the scan again.")
    if array.min() == array.max():
        raise ConstantImageError(path, float(array.flat[0]))
    return replace(scan, array=array)


def few_whole_numbers(array: np.ndarray) -> list[int]:
    """Return the values of an array that looks like a label map; else nothing.

    A label map holds few whole numbers from 0 on: up to 8, or more (one per structure) that neighbouring voxels share.
    """
    for values in (array.reshape(-1)[:: max(array.size // SAMPLE, 1)], array):  # of an image some voxels suffice
        found = np.unique(values)
        if len(found) > MOST_LABELS or found[0] < 0 or not (found == np.rint(found)).all():
            return []
    if len(found) > FEW_LABELS:
        one, other = array[:-1], array[1:]
        both = (one > 0) & (other > 0)
        if (one == other)[both].mean() < SHARED:
            return []
    return [int(value) for value in found] if array.size > len(found) ** 2 else []


def count_volumes(path: Path) -> int:
    """Return how many 3D volumes a NIfTI file holds; 1 for any other file."""
    if not suffix_of(path, NIFTI):
        return 1
    shape = guarded(path, lambda file: _loaded_nifti(file, tell=False).shape)
    return int(shape[3]) if len(shape) == 4 and shape[3] > 0 else 1


def read_label(
    path: Path,
    num_classes: int | None = None,
    *,
    highest: int = 65535,
    pixel_spacing_mm: tuple[float, float] | None = None,
    onto: Scan | None = None,
    may_be_empty: bool = False,
) -> Scan:
    """Read a label map; values a rounding error off a whole number are that number.

    Args:
        path: see read_scan(); or a DICOM segmentation, or a folder with one, whose segments' numbers are the labels.
        num_classes: labels must lie in [0, num_classes); None: in [0, highest].
        highest: the largest label that counts as one, below 2**31.
        pixel_spacing_mm: see read_scan().
        onto: the image; a DICOM segmentation, which may lack slices, is then completed to its grid.
        may_be_empty: accept a label map without foreground, as a healthy case has.

    Returns:
        The label map; array (X, Y, Z), uint8, or uint16 or int32 where a label needs it.

    Raises:
        UserError: it cannot be read, or holds something else than classes, or nothing but background although
            it may not.
    """
    path = path if isinstance(path, Path) else Path(path)
    masks = getattr(path, "masks", ())
    segmentation = segmentation_in(path) if path.exists() and not masks else None
    if masks:
        label = _read_class_masks(path, masks, pixel_spacing_mm)
    elif is_picture(path):
        label = Scan(path, read_mask(path), AFFINE)
    else:
        is_plain = segmentation is None
        label = _read(path, pixel_spacing_mm, is_label=True) if is_plain else _read_segmentation(segmentation, onto)
    top = num_classes or highest + 1
    values = np.unique(label.array)
    with np.errstate(invalid="ignore"):  # infinite values are refused below
        whole = np.rint(values.astype(float))
        is_right = (np.abs(values - whole) <= ROUNDING) & (whole >= 0) & (whole < top)
    if not is_right.all():
        raise UserError(
            f"{path} holds the label {values[~is_right][0]:g}, outside the classes 0 to {top - 1}: correct it, "
            "or give the file of the labels, not of the image or of probabilities."
        )
    if whole.max() == 0 and not may_be_empty:
        raise UserError(f"{path} is empty, all background: give the case's own label, or leave the case out.")
    array = np.rint(label.array) if label.array.dtype.kind == "f" else label.array
    return replace(label, array=np.ascontiguousarray(array, _label_type(int(whole.max()))))


def _read_class_masks(
    path: Path, masks: Sequence[tuple[int, Path]], pixel_spacing_mm: tuple[float, float] | None
) -> Scan:
    """Put one mask file per class together; where they overlap, the class with the highest number counts.

    Raises:
        UserError: a file holds more than one value beside 0, or lies on another grid than the first.
    """
    whole, overlap = None, 0
    for value, file in sorted(masks):
        one = read_label(file, pixel_spacing_mm=pixel_spacing_mm, may_be_empty=True)
        if len(set(np.unique(one.array).tolist()) - {0}) > 1:
            raise UserError(f"{file} holds several labels, and a file of one class holds one: give the class's mask.")
        if whole is None:
            whole = replace(one, path=path, array=np.zeros(one.array.shape, np.uint16))
        mask = aligned_label(replace(whole, path=masks[0][1]), one) > 0
        overlap += int((mask & (whole.array > 0)).sum())
        whole.array[mask] = value
    if overlap:
        LOGGER.info("NOTE: %s: %d voxels lie in several classes' masks; the last class counts there", path, overlap)
    return whole


def _label_type(largest: int) -> type:
    return np.uint8 if largest < 2**8 else np.uint16 if largest < 2**16 else np.int32


def aligned_label(image: Scan, label: Scan, what: str = "label") -> np.ndarray:
    """Bring a label, or another channel, onto its image's axes by their headers: swaps and flips alone.

    Args:
        image: gives the grid.
        label: what is brought there.
        what: to call it in messages.

    Returns:
        The label's array, of the image's shape.

    Raises:
        UserError: shape or geometry differ; the message says how.
    """
    turned = label.oriented(image.orientation)
    fix = f"export both from the same series, or resample the {what} onto the image"
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


def says_nothing(label: Scan) -> bool:
    """Tell whether a label's header holds no geometry: voxels of 1 mm along the axes from the origin."""
    return bool(np.allclose(np.abs(label.affine), np.eye(4), atol=1e-6))


def label_by_index(image: Scan, label: Scan, flip: Sequence[int] = ()) -> np.ndarray:
    """Lay a label's array on an image's, flipped along some axes, without a look at its header.

    Returns:
        The label's array, of the image's shape.

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


def _read(path: Path, pixel_spacing_mm: tuple[float, float] | None, is_label: bool = False) -> Scan:
    path = path if isinstance(path, Path) else Path(path)
    if getattr(path, "files", ()):
        return _checked(_read_dicom(path, path.files, pixel_spacing_mm, is_label))
    if path.is_dir():
        return _checked(_read_dicom(path, _only_series(path), pixel_spacing_mm, is_label))
    if not path.exists():
        raise UserError(f"{path} does not exist: check the path.")
    check_is_loaded(path)
    for suffixes, read in (((*NIFTI, *PAIR), _read_nifti), (ITK, _read_itk), (MGH, _read_mgh)):
        if suffix_of(path, suffixes):
            return _checked(guarded(path, read))
    if is_stack(path):
        return _checked(Scan(path, *read_stack(path, is_label)))
    if is_picture(path):
        channels = read_picture(path)
        if len(channels) > 1:
            raise UserError(f"{path} holds colours, and one number a pixel is needed here: save it as a grey picture.")
        return Scan(path, channels[0], AFFINE)
    if is_dicom(path):
        return _checked(_read_dicom(path, _series_with(path), pixel_spacing_mm, is_label))
    raise UserError(f"{path} is none of {', '.join(SUFFIXES)}, nor a folder of DICOM files: convert it to NIfTI.")


def _read_dicom(
    path: Path, files: Sequence[Path], pixel_spacing_mm: tuple[float, float] | None, is_label: bool
) -> Scan:
    array, affine, names = read_series(path, files, pixel_spacing_mm, is_label)
    return Scan(path, array, LPS_TO_RAS @ affine, slice_names=names)


def _read_segmentation(path: Path, onto: Scan | None) -> Scan:
    segmentation = read_segmentation(path)
    if onto is None:
        array, affine = segmentation.stacked()
        return Scan(path, array, LPS_TO_RAS @ affine)
    array = segmentation.on_grid(onto.path, onto.array.shape, LPS_TO_RAS @ onto.affine)
    return Scan(path, array, onto.affine)


def _only_series(folder: Path) -> tuple[Path, ...]:
    """Return the files of a folder's only series.

    Raises:
        UserError: there is none, or several.
    """
    series, left = sort_out(dicom_files(folder))
    tell_left_out(folder, left)
    if not series:
        raise UserError(f"{folder} holds no DICOM series of slices: give the folder with the scan's .dcm files.")
    if len(series) > 1:
        counts = " and ".join(f"{one.count} images from {one.files[0].name} on" for one in series[:3])
        raise UserError(
            f"{folder} holds {len(series)} series ({counts}): give a folder that holds one, or leave one of them there."
        )
    return series[0].files


def _series_with(path: Path) -> tuple[Path, ...]:
    """Return the files of the series, in a file's folder, that the file belongs to.

    Raises:
        UserError: the file belongs to none.
    """
    series, left = sort_out(p for p in dicom_files(path.parent) if p.parent == path.parent)
    for one in series:
        if path in one.files:
            if one.count > 1 and len(one.files) > 1:
                LOGGER.info("%s: one of the %d files of its series, which are read together", path, len(one.files))
            return one.files
    reason = next((reason[0] for reason, paths in left.items() if path in paths), "belongs to no series")
    raise UserError(f"{path} {reason.rstrip(',')}: give the folder that holds the scan.")


def _volume_shape(path: Path, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the first three sides, of which no others may be longer than 1; an image of two is one slice."""
    shape = (*shape, 1) if len(shape) == 2 else shape
    if len(shape) == 4 and shape[3] > 1 and 0 not in shape:
        raise UserError(
            f"{path} holds {shape[3]} volumes: name them by --channels if they are channels (import), or predict each "
            "by --frames."
        )
    if len(shape) < 3 or any(side != 1 for side in shape[3:]) or 0 in shape:
        raise UserError(f"{path} has the shape {_times(shape)}, it must be one volume of three dimensions: export one.")
    return tuple(shape[:3])


def _loaded_nifti(path: Path, tell: bool = True) -> nibabel.Nifti1Pair:
    """Open a NIfTI file by its content: some are called .nii.gz and are not compressed, or .nii and are."""
    with open(path, "rb") as file:
        begin = file.read(4)
    is_named_gz = path.name.lower().endswith(".gz")
    is_plain = 348 in (sizes := [int.from_bytes(begin, order) for order in ("little", "big")]) or 540 in sizes
    if suffix_of(path, PAIR) or is_named_gz == begin.startswith(GZIP) or not (is_plain or begin.startswith(GZIP)):
        return nibabel.load(path)
    what = "is not compressed, though its name ends with .gz" if is_named_gz else "is compressed, though named .nii"
    if tell:
        LOGGER.info("NOTE: %s %s; it is read anyway", path, what)
    content = open(path, "rb") if is_named_gz else gzip.open(path)  # noqa: SIM115 - its voxels are read from it later
    size = content.read(4)
    content.seek(0)
    is_first = 348 in [int.from_bytes(size, order) for order in ("little", "big")]
    kind = nibabel.Nifti1Image if is_first else nibabel.Nifti2Image
    image = kind.from_stream(content)
    image.file_map["image"].filename = os.fspath(path)
    return image


def _read_nifti(path: Path) -> Scan:
    image = _loaded_nifti(path)
    if not isinstance(image, (nibabel.Nifti1Image, nibabel.Nifti1Pair)):
        raise UserError(f"{path} is no NIfTI file, whatever its name says: convert it.")
    kind = image.get_data_dtype().kind
    if kind not in "fiub":
        raise UserError(f"{path} holds {image.get_data_dtype()} voxels: export it with one number a voxel.")
    volume = getattr(path, "volume", None)
    shape = _volume_shape(path, image.shape if volume is None else image.shape[:3])
    stored = Path(image.file_map["image"].filename).stat().st_size
    check_declared(path, "its header", image.shape, image.get_data_dtype().itemsize, stored)
    array = np.asanyarray(image.dataobj if volume is None else image.dataobj[..., volume]).reshape(shape)
    array = np.array(array) if isinstance(array, np.memmap) else array  # the file may change or go meanwhile
    return Scan(path, array, _nifti_affine(path, image), image.header)


def _nifti_affine(path: Path, image: nibabel.Nifti1Pair) -> np.ndarray:
    """Return a NIfTI image's affine in mm: its sform's, else its qform's; what is doubtful about it is logged."""
    try:
        unit = image.header.get_xyzt_units()[0]
    except KeyError:
        unit = "unknown"
    affine = np.array(image.affine, float)
    affine[:3] *= UNITS_MM.get(unit, 1.0)
    if len(image.shape) == 2 and not affine[:3, 2].any():  # a slice whose header gives it no thickness
        normal = np.cross(affine[:3, 0], affine[:3, 1])
        affine[:3, 2] = normal / max(np.linalg.norm(normal), 1e-12)
    scan = Scan(path, np.empty(image.shape[:3] if len(image.shape) > 2 else (*image.shape, 1), np.bool_), affine)
    if unit in ("meter", "micron") and not _is_plausible(scan):
        raise UserError(
            f"{path}: its header gives voxels of {_times(scan.spacing_mm)} mm, its unit being the {unit}, which no "
            "scan has: correct the unit (xyzt_units)."
        )
    codes = int(image.header["sform_code"]), int(image.header["qform_code"])
    length = float(sum(np.square([image.header[f"quatern_{name}"] for name in "bcd"], dtype=float)))
    if codes[1] > 0 and not length <= 1 + ROUNDING_OF_ONE:
        counts = "the sform counts" if codes[0] > 0 else "the rotation nearest to it counts"
        LOGGER.info("NOTE: %s: the quaternion of its qform is longer than 1 (by %.2g); %s", path, length - 1, counts)
        image.header.set_qform(image.affine, codes[1])  # for what is written onto its grid
    elif codes[0] > 0 and codes[1] > 0:
        other = np.array(image.header.get_qform(), float)
        other[:3] *= UNITS_MM.get(unit, 1.0)
        offset = corner_offset_mm(scan, replace(scan, affine=other))
        if not offset <= GEOMETRY_TOLERANCE * min(scan.spacing_mm):
            LOGGER.info("NOTE: %s: its sform and qform differ by up to %.3g mm; the sform counts", path, offset)
    elif max(codes) <= 0:
        LOGGER.info("NOTE: %s: its header does not say how it lies (sform and qform code 0); axes taken as %s",
                    path, scan.orientation)  # fmt: skip
    return affine


def _read_mgh(path: Path) -> Scan:
    image = nibabel.load(path)
    shape = _volume_shape(path, image.shape)
    check_declared(path, "its header", image.shape, image.get_data_dtype().itemsize, path.stat().st_size)
    return Scan(path, np.array(image.get_fdata(dtype=np.float32)).reshape(shape), np.array(image.affine, float))


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
    affine, sides = np.eye(4), image.GetDimension()
    affine[:sides, :sides] = np.reshape(image.GetDirection(), (sides, sides)) * image.GetSpacing()
    affine[:sides, 3] = image.GetOrigin()
    affine[:sides] *= _units_mm(path, sides)[:, None]
    return Scan(path, sitk.GetArrayFromImage(image).T.reshape(shape), LPS_TO_RAS @ affine)


def _units_mm(path: Path, sides: int) -> np.ndarray:
    """Return the mm of the unit along each axis in space that an NRRD or MetaImage header names, which ITK leaves out.

    Raises:
        UserError: the unit is no length.

    Source: NRRD's `space units` and `units`, MetaImage's `DistanceUnits`.
    """
    with open(path, "rb") as file:
        text = file.read(MAX_TEXT_HEADER)
    if suffix_of(path, (".nrrd", ".nhdr")):
        text = re.split(rb"\r?\n\r?\n", text, maxsplit=1)[0]
        has_sides = re.search(rb"^(space directions|spacings):", text, re.MULTILINE)
        found = re.search(rb"^space units:\s*(.*?)\s*$", text, re.MULTILINE)
        if found is None and not re.search(rb"^space directions:", text, re.MULTILINE):
            found = re.search(rb"^units:\s*(.*?)\s*$", text, re.MULTILINE)
        named = re.findall(rb'"([^"]*)"|(\S+)', found[1]) if found else []
        units = [(quoted or bare).decode("utf-8", "replace") for quoted, bare in named]
    else:
        text = re.split(rb"ElementDataFile", text, maxsplit=1)[0]
        has_sides = re.search(rb"^\s*Element(Spacing|Size)\s*=", text, re.MULTILINE)
        found = re.search(rb"^\s*DistanceUnits\s*=\s*(.*?)\s*$", text, re.MULTILINE)
        units = [found[1].decode("utf-8", "replace")] * sides if found else []
    units = [unit.strip() for unit in units[:sides]]
    units += [""] * (sides - len(units))
    if not has_sides:
        LOGGER.warning("WARNING: %s: its header gives no voxel sides; 1 mm is taken along each axis", path)
    strange = next((unit for unit in units if unit.lower() not in LENGTHS_MM), None)
    if strange is not None:
        raise UserError(f"{path}: its header gives lengths in {strange!r}: convert the file to mm.")
    factors = np.array([LENGTHS_MM[unit.lower()] for unit in units])
    if (factors != 1).any():
        names = ", ".join(dict.fromkeys(units))
        LOGGER.info("NOTE: %s: its header gives lengths in %s; they are converted to mm", path, names)
    return factors


def _checked(scan: Scan) -> Scan:
    """Refuse a geometry that cannot be one."""
    matrix = scan.affine[:3, :3]
    if not np.isfinite(scan.affine).all() or abs(np.linalg.det(matrix)) < 1e-9:
        raise UserError(
            f"{scan.path}: its header gives no usable geometry (affine {matrix.round(3).tolist()}): correct it."
        )
    if not _is_plausible(scan):
        raise UserError(
            f"{scan.path}: its header gives voxels of {_times(scan.spacing_mm)} mm, which no scan has: correct it."
        )
    return scan


def _is_plausible(scan: Scan) -> bool:
    return all(SIDES_MM[0] <= side <= SIDES_MM[1] for side in scan.spacing_mm)
