"""2D DICOM pictures: X-rays, ultrasound frames and photographs, which lie nowhere in space."""

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import pydicom

from dataloaders.checks import check_declared
from dataloaders.scans.dicom import check_lengths, guarded, is_dicom, pixel_problem, quiet, read_header, undecodable
from dataloaders.scans.dicom_pixels import read_pixels
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

CLASSES = "1.2.840.10008.5.1.4.1.1."  # the beginning of the SOP classes of images
STILL_CLASSES = (
    "1", "1.1", "1.1.1", "1.2", "1.2.1", "1.3", "1.3.1",  # CR; digital X-ray, mammography, intra-oral
    "6", "6.1", "3.1", "12.1", "12.2",  # ultrasound, angiography, fluoroscopy
    "77.1.1", "77.1.2", "77.1.4", "77.1.5.1", "77.1.5.2",  # endoscopy, microscopy, photography, ophthalmology
)  # fmt: skip
STILL_MODALITIES = ("CR", "DX", "MG", "IO", "PX", "RG", "XA", "RF", "US", "OP", "XC", "ES", "GM", "DMS")
CAPTURE_MODALITIES = ("", "OT")  # of secondary captures that are pictures; one of a CT is its report
CAPTURES = "7"
HEADER = (
    "SOPClassUID", "Modality", "NumberOfFrames", "ImagePositionPatient", "Rows", "Columns", "SamplesPerPixel",
    "PhotometricInterpretation", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
)  # fmt: skip


def is_still(path: Path) -> bool:
    """Tell whether a file is a DICOM picture that lies nowhere in space: one frame of X-ray, ultrasound and others."""
    if getattr(path, "files", ()) or not path.is_file() or not is_dicom(path):
        return False
    status = path.stat()
    return _is_still(os.fspath(path), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2**16)
def _is_still(path: str, changed_at: int, size: int) -> bool:
    quiet()
    try:
        data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(HEADER))
        if not data.get("Rows") or int(data.get("NumberOfFrames") or 1) > 1:
            return False
        groups = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
        if data.get("ImagePositionPatient") or any(data.get(name) for name in groups):
            return False
        kind = str(data.get("SOPClassUID") or data.file_meta.get("MediaStorageSOPClassUID") or "")
        number, modality = kind.removeprefix(CLASSES), str(data.get("Modality") or "").upper()
        is_capture = f"{number}.".startswith(f"{CAPTURES}.") and modality in CAPTURE_MODALITIES
        return number in STILL_CLASSES or modality in STILL_MODALITIES or is_capture
    except Exception:  # noqa: BLE001 - who reads it as a series says what is the matter with it
        return False


def has_samples(path: Path) -> bool:
    """Tell whether a DICOM picture is stored in colours, grey or not."""
    data = guarded(path, lambda file: pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(HEADER)))
    kind = str(data.get("PhotometricInterpretation") or "")
    return int(data.get("SamplesPerPixel") or 1) > 1 or kind == "PALETTE COLOR"


def read_still(path: Path) -> tuple[np.ndarray, bool]:
    """Read a DICOM picture.

    A grey one that is stored with low values white (MONOCHROME1) is inverted so that bone is bright in all images.

    Returns:
        (rows, columns) of a grey picture, stored value × slope + intercept; (rows, columns, 3) of one with colours,
        uint8; and whether its compression may have changed values.

    Raises:
        UserError: it cannot be read.
    """
    return guarded(path, _read)


def _read(path: Path) -> tuple[np.ndarray, bool]:
    check_lengths(path)
    if has_samples(path):
        return _read_colours(path)
    data = pydicom.dcmread(path, stop_before_pixels=True)
    problem = pixel_problem(data)
    if problem:
        raise UserError(f"{path} {problem}.")
    pixels = read_pixels(path, read_header(path))
    values, is_padding = pixels.values[:, :, 0].T, pixels.is_padding
    if str(data.get("PhotometricInterpretation")) == "MONOCHROME1":
        LOGGER.info("NOTE: %s: low values are white (MONOCHROME1); it is turned round, so that they are dark", path)
        values = values.max() - values.astype(np.float64) + values.min()
    if is_padding is not None and not is_padding.all():
        is_padding = is_padding[:, :, 0].T
        values = np.where(is_padding, values[~is_padding].min(), values)
        LOGGER.info("NOTE: %s: its padding (%s) becomes its least other value", path, pixels.padding)
    return values, False


def _read_colours(path: Path) -> tuple[np.ndarray, bool]:
    data = pydicom.dcmread(path)
    syntax = data.file_meta.TransferSyntaxUID
    shape = (int(data.Columns), int(data.Rows), 3)
    check_declared(path, "its header", shape, 1, path.stat().st_size)
    if int(data.get("BitsAllocated") or 8) != 8:
        raise UserError(f"{path} holds colours of {data.BitsAllocated} bits, of which 8 are read: export it with 8.")
    try:
        array = data.pixel_array  # red, green and blue, whatever they are stored as
        if str(data.PhotometricInterpretation) == "PALETTE COLOR":
            array = pydicom.pixels.apply_color_lut(array, data)[..., :3]
            array = (array >> 8).astype(np.uint8) if array.dtype.itemsize > 1 else array
    except (RuntimeError, ValueError, NotImplementedError, AttributeError):
        raise undecodable(path, syntax) from None
    return array, syntax.is_compressed
