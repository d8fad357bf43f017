"""DICOM files one by one: which they are, whether their parts fit into them, what their headers say."""

import logging
import os
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pydicom
from pydicom import uid as uids

from dataloaders.checks import LFS, check_declared, check_is_loaded
from sdcl.runs.errors import UserError

LONG_VRS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
IMPLICIT, BIG_ENDIAN, DEFLATED = b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99"
TRANSFER_SYNTAX, PIXELS = (0x0002, 0x0010), (0x7FE0, 0x0010)
META, ITEM = 0x0002, 0xFFFE  # groups: the file's own header, always explicit; parts of sequences, without a VR
UNDEFINED = 0xFFFFFFFF  # length of what ends at a delimiter
TAGS = [
    "SOPClassUID", "SOPInstanceUID", "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber",
    "SeriesDescription", "ImageType", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "BitsAllocated", "BitsStored", "HighBit",
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "SliceThickness", "SpacingBetweenSlices",
    "InstanceNumber", "TemporalPositionIdentifier", "EchoTime", "TriggerTime", "DiffusionBValue", "AcquisitionNumber",
    "AcquisitionTime", "ContentTime", "SeriesTime", "FrameTime", "FrameTimeVector", "CineRate",
]  # fmt: skip
# What tells the pictures of several phases, echoes or acquisitions apart, and where multi-frame files have it.
MARKS = (
    ("TemporalPositionIdentifier", "FrameContentSequence", "TemporalPositionIndex"),
    ("EchoTime", "MREchoSequence", "EffectiveEchoTime"),
    ("TriggerTime", "CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
    ("DiffusionBValue", "MRDiffusionSequence", "DiffusionBValue"),
    ("AcquisitionNumber", "FrameContentSequence", "FrameAcquisitionNumber"),
    ("AcquisitionTime", "FrameContentSequence", "FrameAcquisitionDateTime"),
    ("ContentTime", "FrameContentSequence", "FrameReferenceDateTime"),
    ("SeriesTime", "FrameContentSequence", "StackID"),
    ("ImageType", "CTImageFrameTypeSequence", "FrameType"),
)
CAPTURES = "1.2.840.10008.5.1.4.1.1.7"  # secondary captures: this class, and those whose numbers go on with a point
LABEL_MAP, HEIGHT_MAP = "1.2.840.10008.5.1.4.1.1.66.7", "1.2.840.10008.5.1.4.1.1.66.8"  # segmentations too
DERIVED = ("Segmentation Storage", "Surface", "RT Dose", "Parametric Map", "Real World Value")  # made from images
CINE = ("FrameTime", "FrameTimeVector", "CineRate")
NAMES = (".dcm", ".dicom", ".dic")  # how DICOM files' names end, if they do
STEPS = ("SpacingBetweenSlices", "SliceThickness")
AXES_TOLERANCE = 0.01  # of a direction's length and of two directions' product
# What the pixels' reader decodes, as tests compare it with other decoders; it does not know other ones.
JPEG_2000, JPEG_LS = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"), uids.JPEGLSTransferSyntaxes
JPEG = (uids.JPEGBaseline8Bit, uids.JPEGExtended12Bit, uids.JPEGLossless, uids.JPEGLosslessSV1)
PLAIN = (uids.ImplicitVRLittleEndian, uids.ExplicitVRLittleEndian, uids.DeflatedExplicitVRLittleEndian)
DECODED = (*PLAIN, uids.ExplicitVRBigEndian, uids.RLELossless, *JPEG, *JPEG_LS, *JPEG_2000)
UNCOMPRESSED = "export the series again uncompressed (Explicit VR Little Endian)"
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a DICOM file and where it lies, in mm, x to the patient's left (LPS).

    Attributes:
        path: of its file.
        number: in its file, from 0.
        position: (3,), of the first pixel's centre.
        axes: (2, 3), where the picture's x (along a row) and y (down a column) point.
        sides: of a pixel along x and y; None where the header has no PixelSpacing.
        step_mm: SpacingBetweenSlices, else SliceThickness; None where the header has neither.
        instance: InstanceNumber.
        marks: attributes of MARKS and their values.
        is_one_of_many: the file has more pictures.
    """

    path: Path
    number: int
    position: np.ndarray
    axes: np.ndarray
    sides: tuple[float, float] | None
    step_mm: float | None = None
    instance: int | None = None
    marks: tuple[tuple[str, str], ...] = ()
    is_one_of_many: bool = False


@dataclass(frozen=True, eq=False)
class Header:
    """What a DICOM image file says of itself.

    Attributes:
        path: the file.
        series, study, patient, instance: its identifiers; "" where there is none.
        number: of the series in its study.
        description: of the series.
        is_localiser: its ImageType says so.
        is_capture: it is a secondary capture, such as a dose report or a screenshot, by its class.
        image_type: ImageType's values.
        shape: (columns, rows).
        count: of its pictures.
        frames: its pictures, in the file's order; none where there is a problem.
        problem: why it cannot be part of a scan, to follow the file's name; "" if it can.
        syntax: how its pixels are stored (transfer syntax).
        rescales: slope and intercept of its pictures, each once; None for a number that the header lacks.
    """

    path: Path
    series: str
    study: str
    patient: str
    instance: str
    number: int | None
    description: str
    is_localiser: bool
    is_capture: bool
    image_type: tuple[str, ...]
    shape: tuple[int, int]
    count: int
    frames: tuple[Frame, ...]
    problem: str
    syntax: pydicom.uid.UID
    rescales: frozenset[tuple[float | None, float | None]] = frozenset()


def quiet() -> None:
    """Keep pydicom and highdicom from writing to the terminal: their warnings quote headers, a patient's name too."""
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    warnings.filterwarnings("ignore", module=r"(pydicom|highdicom|dataloaders\.scans\.dicom)")
    for name in ("pydicom", "highdicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def is_dicom(path: Path) -> bool:
    """Tell whether a file begins as DICOM files do, or is a git-lfs pointer to one, whose reading says so."""
    try:
        with open(path, "rb") as file:
            begin = file.read(132)
        return begin[128:] == b"DICM" or (begin.startswith(LFS) and path.name.lower().endswith(NAMES))
    except OSError:
        return False


def dicom_files(folder: Path) -> Iterator[Path]:
    """Yield the DICOM files of a folder and its subfolders, by name."""
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if name != "DICOMDIR" and is_dicom(Path(parent) / name):
                yield Path(parent) / name


def check_lengths(path: Path) -> None:
    """Refuse a file one of whose elements says that it is longer than the file: a reader would ask for that memory.

    Args:
        path: a DICOM file. Big-endian and deflated ones, which are hardly found any more, are left to the reader.

    Raises:
        UserError: names the file and the element.

    Source: DICOM PS3.5 chapter 7 (elements, sequences) and annex A (transfer syntaxes), PS3.10 chapter 7.
    """
    size, syntax = path.stat().st_size, b""
    in_pixels = False
    with open(path, "rb") as file:
        file.seek(132)
        while len(head := file.read(8)) == 8:
            tag, vr = struct.unpack("<HH", head[:4]), head[4:6]
            if tag[0] > META and syntax in (BIG_ENDIAN, DEFLATED):
                return
            if tag[0] == ITEM or (tag[0] > META and syntax == IMPLICIT):
                (length,) = struct.unpack("<I", head[4:])
            elif vr in LONG_VRS:
                (length,) = struct.unpack("<I", file.read(4).ljust(4, b"\0"))
            else:
                (length,) = struct.unpack("<H", head[6:])
            is_container = length == UNDEFINED or (tag[0] == ITEM and not in_pixels)  # walked into, not over
            if length == UNDEFINED and vr == b"UN" and syntax != IMPLICIT and tag[0] != ITEM:
                return  # its contents are written by other rules
            if not is_container and length > size - file.tell():
                raise UserError(
                    f"{path} is damaged: its element ({tag[0]:04x},{tag[1]:04x}) says it has {length} bytes, more "
                    "than are left of the file; copy it again."
                )
            in_pixels = tag == PIXELS or (in_pixels and tag[0] == ITEM)
            if tag == TRANSFER_SYNTAX:
                syntax = file.read(length).strip(b"\0 ")
            elif not is_container:
                file.seek(length, os.SEEK_CUR)


def guarded(path: Path, read: Callable[[Path], Result]) -> Result:
    """Call a library's reader; a damaged file makes it fail in many ways, all of which mean the same.

    Raises:
        UserError: it failed, or the file is a git-lfs pointer.
    """
    check_is_loaded(path)
    try:
        return read(path)
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path} does not fit into memory: close other programs, or crop it.") from None
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1][:160] if lines else type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}): it is damaged or no such file; copy it again.") from None


def undecodable(path: Path, syntax: uids.UID) -> UserError:
    """Return what is said of pixels that their decoder refuses, which a library says in its own words."""
    return UserError(
        f"{path}: its pixels, stored as {syntax.name}, cannot be decoded: copy the file again, or {UNCOMPRESSED}."
    )


def read_header(path: Path) -> Header | None:
    """Read an image file's header; None for a file that holds no image: a report, a presentation state, a plan.

    Segmentations and doses, which are made from images, count as none.

    Raises:
        UserError: the file is damaged.
    """
    return guarded(path, _read_header)


def _read_header(path: Path) -> Header | None:
    check_lengths(path)
    quiet()
    data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS)
    kind = pydicom.uid.UID(str(data.get("SOPClassUID") or data.file_meta.get("MediaStorageSOPClassUID") or ""))
    is_derived = kind in (LABEL_MAP, HEIGHT_MAP) or any(word in kind.name for word in DERIVED)
    if is_derived or (kind and not data.get("Rows") and "Image" not in kind.name):
        return None
    shape, count = (int(data.Columns), int(data.Rows)), int(data.get("NumberOfFrames") or 1)
    check_declared(path, "its header", (*shape, count), 1, path.stat().st_size)
    syntax = uids.UID(str(data.file_meta.get("TransferSyntaxUID") or uids.ImplicitVRLittleEndian))
    frames, rescales, problem = (), frozenset(), _storage(data, syntax) or _colours(data) or _lookup_table(data)
    if not problem:
        try:
            frames = tuple(frame_of(path, data, number, count) for number in range(count))
            rescales = frozenset(rescale_of(data, number) for number in range(count))
        except (KeyError, AttributeError, IndexError) as error:
            problem = _unplaced(data, count, error)
    text = {name: str(data.get(tag) or "").strip("\0 ") for name, tag in _TEXTS.items()}
    number = str(data.get("SeriesNumber") or "")
    value = data.get("ImageType") or ()
    image_type = tuple(str(part).upper() for part in ([value] if isinstance(value, str) else value))
    return Header(
        path, **text, number=int(number) if number.isdecimal() else None, shape=shape, count=count, frames=frames,
        is_localiser="LOCALIZER" in str(image_type), problem=problem, syntax=syntax,
        rescales=rescales, is_capture=f"{kind}.".startswith(f"{CAPTURES}."), image_type=image_type,
    )  # fmt: skip


_TEXTS = {
    "series": "SeriesInstanceUID", "study": "StudyInstanceUID", "patient": "PatientID", "instance": "SOPInstanceUID",
    "description": "SeriesDescription",
}  # fmt: skip


def _storage(data: pydicom.Dataset, syntax: uids.UID) -> str:
    """Say why the pixels' reader would not decode a picture, or wrongly without a word; "" if it does it right."""
    if syntax not in DECODED:
        return f"is stored as {syntax.name} ({syntax}), which is not read here: {UNCOMPRESSED}"
    bits = int(data.get("BitsAllocated") or 16)
    used = int(data.get("BitsStored") or bits)
    if bits not in (8, 16, 32) or (bits != 16 and (used != bits or syntax == uids.ExplicitVRBigEndian)):
        return f"stores {used} of {bits} bits a pixel as {syntax.name}, which is not read here: {UNCOMPRESSED}"
    highest = int(data.get("HighBit", used - 1))
    if not 0 < used <= highest + 1 <= bits:
        return f"has the HighBit {highest} for BitsStored {used} of {bits}, which cannot be: export the series again"
    if highest != used - 1 and syntax.is_compressed and syntax != uids.DeflatedExplicitVRLittleEndian:
        return f"has the HighBit {highest} for BitsStored {used} in compressed pixels: {UNCOMPRESSED}"
    return ""


def pixel_problem(data: pydicom.Dataset) -> str:
    """Say why a file's grey pixels would not be read, or wrongly, to follow the file's name; "" if they would."""
    syntax = uids.UID(str(data.file_meta.get("TransferSyntaxUID") or uids.ImplicitVRLittleEndian))
    return _storage(data, syntax) or _lookup_table(data)


def _colours(data: pydicom.Dataset) -> str:
    """Say why a picture is no map of one number a pixel; "" if it is."""
    kind = str(data.get("PhotometricInterpretation") or "MONOCHROME2")
    if int(data.get("SamplesPerPixel") or 1) == 1 and kind in ("MONOCHROME1", "MONOCHROME2"):
        return ""
    return f"holds colours ({kind}), not one number a pixel: give the series that it was made from"


def _lookup_table(data: pydicom.Dataset) -> str:
    """Say that stored values become the scan's by a table, which is not applied here; "" if they do not."""
    places = [data]
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in data.get(name) or ():
            places += group.get("PixelValueTransformationSequence") or ()
    if not any(one.get("ModalityLUTSequence") for one in places):
        return ""
    return (
        "turns its stored values into the scan's by a table (ModalityLUTSequence), which is not read here: convert the "
        "series with dcm2niix, or export it with RescaleSlope and RescaleIntercept"
    )


def rescale_of(data: pydicom.Dataset, number: int) -> tuple[float | None, float | None]:
    """Return RescaleSlope and RescaleIntercept of one picture; None for a number that the header lacks.

    Raises:
        ValueError: a number is none.
    """
    found = []
    for name in ("RescaleSlope", "RescaleIntercept"):
        value = frame_attribute(data, number, "PixelValueTransformationSequence", name)
        found.append(None if value is None or value == "" else float(value))
        if found[-1] is not None and not np.isfinite(found[-1]):
            raise ValueError(f"{name} is {value}")
    return found[0], found[1]


def _unplaced(data: pydicom.Dataset, count: int, error: Exception) -> str:
    """Say what a header lacks; the way out differs for files of many frames."""
    if count > 1 and (cine := next((name for name in CINE if data.get(name)), None)):
        return f"is a cine of {count} frames ({cine}), no volume: export the frames that you mean as single pictures"
    if count > 1:
        return (
            f"is a multi-frame file whose header does not say where each of its {count} frames lies: convert the "
            "series with dcm2niix and check the distance of its slices"
        )
    attribute = str(error).strip("'\"").split("'")[-1] or "ImagePositionPatient"
    return f"does not say where its picture lies ({attribute}): export the series again, or move the file away"


def frame_attribute(data: pydicom.Dataset, number: int, sequence: str, name: str) -> Any:
    """Return an attribute of one picture, from its own functional group, the file's shared one, or the header itself.

    Source: DICOM PS3.3 C.7.6.16 (multi-frame functional groups).
    """
    groups, shared = data.get("PerFrameFunctionalGroupsSequence"), data.get("SharedFunctionalGroupsSequence")
    places = [groups[number]] if groups is not None else []
    places += [shared[0]] if shared else []
    return next((place[sequence].value[0] for place in places if sequence in place), data).get(name)


def frame_of(path: Path, data: pydicom.Dataset, number: int, count: int) -> Frame:
    """Return the place of one of a file's pictures.

    Raises:
        KeyError: the header does not say it.
        ValueError: it says what cannot be.

    Source: DICOM PS3.3 C.7.6.2 (image plane).
    """
    groups = data.get("PerFrameFunctionalGroupsSequence")
    if groups is not None and len(groups) != count:
        raise ValueError(f"{len(groups)} groups for {count} frames")
    if groups is None and count > 1:
        raise KeyError("PerFrameFunctionalGroupsSequence")
    position = frame_attribute(data, number, "PlanePositionSequence", "ImagePositionPatient")
    axes = frame_attribute(data, number, "PlaneOrientationSequence", "ImageOrientationPatient")
    spacing = frame_attribute(data, number, "PixelMeasuresSequence", "PixelSpacing")
    for found, attribute in ((position, "ImagePositionPatient"), (axes, "ImageOrientationPatient")):
        if not found:
            raise KeyError(attribute)
    position, axes = np.array(position, float).reshape(3), np.array(axes, float).reshape(2, 3)
    if not np.isfinite(position).all() or not np.allclose(axes @ axes.T, np.eye(2), rtol=0, atol=AXES_TOLERANCE):
        raise ValueError(f"ImageOrientationPatient is {axes.ravel().round(4).tolist()}")
    steps = [frame_attribute(data, number, "PixelMeasuresSequence", name) for name in STEPS]
    marks = [(name, frame_attribute(data, number, sequence, inside)) for name, sequence, inside in MARKS]
    marks = [(name, data.get(name) if value is None else value) for name, value in marks]
    instance = str(data.get("InstanceNumber") or "")
    return Frame(
        path, number, position, axes, _sides(spacing),
        step_mm=next((abs(float(step)) for step in steps if step), None),
        instance=int(instance) if instance.isdecimal() else None,
        marks=tuple((name, str(value)) for name, value in marks if value not in (None, "")),
        is_one_of_many=count > 1,
    )  # fmt: skip


def _sides(spacing: Any) -> tuple[float, float] | None:
    """Return a pixel's sides along x and y; PixelSpacing has them the other way round."""
    if not spacing:
        return None
    rows, columns = (float(side) for side in spacing)
    if not (0 < rows < np.inf and 0 < columns < np.inf):
        raise ValueError(f"PixelSpacing is {rows:g} {columns:g}")
    return columns, rows
