"""Pixel values of DICOM files: stored values, the rescale to the scan's unit, and padding."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom import uid as uids
from pydicom.pixels import pixel_array

from dataloaders.scans.dicom import Header, rescale_of, undecodable
from sdcl.runs.errors import UserError

NATIVE = (
    uids.ImplicitVRLittleEndian, uids.ExplicitVRLittleEndian, uids.DeflatedExplicitVRLittleEndian,
    uids.ExplicitVRBigEndian,
)  # fmt: skip
LOSSY = (uids.JPEGBaseline8Bit, uids.JPEGExtended12Bit, uids.JPEGLSNearLossless, uids.JPEG2000)
PIXEL_MODULE = (
    "Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "NumberOfFrames", "PixelData",
)  # fmt: skip
CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # secondary capture


@dataclass(frozen=True, eq=False)
class Pixels:
    """Pictures of one file.

    Attributes:
        values: (X, Y, count), stored values × slope + intercept; int16 or int32 where all of them are whole.
        is_padding: (X, Y, count), where a stored value is PixelPaddingValue or in its range; None without padding.
        padding: PixelPaddingValue and PixelPaddingRangeLimit as the header has them, for messages.
    """

    values: np.ndarray
    is_padding: np.ndarray | None = None
    padding: str = ""


def read_pixels(path: Path, header: Header) -> Pixels:
    """Read a file's pictures.

    MONOCHROME1 says how a viewer shows a picture. It does not change the values.

    Raises:
        UserError: the pixels cannot be decoded, are fewer than the header says, or are not aligned as HighBit says.

    Source: DICOM PS3.3 C.7.6.3 (image pixel), C.11.1 (modality LUT), C.7.5.1.1.2 (pixel padding).
    """
    data = pydicom.dcmread(path)
    if header.syntax in NATIVE:
        cells, stored = _native(path, data, header)
    else:
        stored = cells = _decompressed(path, data, header)
    if stored.shape != (header.count, header.shape[1], header.shape[0]):
        raise UserError(
            f"{path} holds {'×'.join(map(str, stored.shape[::-1]))} pixels where its header says "
            f"{header.shape[0]}×{header.shape[1]}×{header.count}: export the series again."
        )
    is_padding, padding = _padding(data, cells, stored)
    if header.syntax in LOSSY or str(data.get("LossyImageCompression") or "00") == "01":
        is_padding = None  # padding has many values after a lossy compression
    frames = [_rescaled(stored[k], *rescale_of(data, k)) for k in range(header.count)]
    return Pixels(np.stack(frames).T, None if is_padding is None else is_padding.T, padding)


def _native(path: Path, data: pydicom.Dataset, header: Header) -> tuple[np.ndarray, np.ndarray]:
    """Return uncompressed pixels as allocated cells and as stored values; both (count, rows, columns)."""
    bits = int(data.BitsAllocated)
    order = ">" if header.syntax == uids.ExplicitVRBigEndian else "<"
    shape = (header.count, header.shape[1], header.shape[0])
    size = int(np.prod(shape)) * bits // 8
    if len(data.PixelData) < size:
        raise ValueError(f"{len(data.PixelData)} bytes of pixels where its header says {size}")
    cells = np.frombuffer(data.PixelData[:size], f"{order}u{bits // 8}").astype(f"=u{bits // 8}").reshape(shape)
    used = int(data.get("BitsStored") or bits)
    shift = int(data.get("HighBit", used - 1)) - used + 1
    if shift and (cells & ((1 << shift) - 1)).any():
        raise UserError(
            f"{path}: its HighBit {data.HighBit} and BitsStored {used} say that the lowest {shift} bits of each pixel "
            "are empty, but they are not: correct HighBit, or export the series again."
        )
    signed = cells.dtype.str.replace("u", "i")
    is_signed = bool(data.get("PixelRepresentation"))
    # Bits above HighBit, such as overlays, are shifted out; a signed value's sign is spread over them.
    above = bits - used - shift
    stored = np.left_shift(cells, above).view(signed if is_signed else cells.dtype)
    return cells, np.right_shift(stored, bits - used)


def _decompressed(path: Path, data: pydicom.Dataset, header: Header) -> np.ndarray:
    """Return compressed pixels as stored values, (count, rows, columns).

    The decoder gets a copy without rescale, photometric interpretation and other headers that change values.
    """
    try:
        if header.syntax == uids.RLELossless:
            return pixel_array(data, raw=True).reshape(header.count, *header.shape[::-1])
        copy = pydicom.Dataset()
        copy.file_meta = pydicom.dataset.FileMetaDataset()
        copy.file_meta.TransferSyntaxUID = header.syntax
        copy.file_meta.MediaStorageSOPClassUID = copy.SOPClassUID = CAPTURE
        copy.file_meta.MediaStorageSOPInstanceUID = copy.SOPInstanceUID = "1.2.3"
        copy.PhotometricInterpretation = "MONOCHROME2"
        for name in PIXEL_MODULE:
            if name in data:
                copy.add(data[name])
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "pixels.dcm")
            copy.save_as(file, enforce_file_format=True)
            array = sitk.GetArrayFromImage(sitk.ReadImage(file, imageIO="GDCMImageIO"))
        return array[None] if array.ndim == 2 else array
    except (RuntimeError, ValueError):
        raise undecodable(path, header.syntax) from None


def _padding(data: pydicom.Dataset, cells: np.ndarray, stored: np.ndarray) -> tuple[np.ndarray | None, str]:
    """Return where pixels are padding, and the attributes that say so.

    Some writers store the padding's value with the wrong sign, or in bits beyond those that BitsStored names.
    """
    first, limit = (_whole(data.get(name)) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if first is None:
        return None, ""
    ends = [first] if limit is None else [first, limit]
    bits, allocated = int(data.get("BitsStored") or data.BitsAllocated), int(data.BitsAllocated)
    is_signed = bool(data.get("PixelRepresentation"))
    fits = all((-(2 ** (bits - 1)) if is_signed else 0) <= end < 2**bits for end in ends)
    if fits:
        ends = [end - 2**bits if is_signed and end >= 2 ** (bits - 1) else end for end in ends]
        where = (stored >= min(ends)) & (stored <= max(ends))
    else:
        ends = [end % 2**allocated for end in ends]
        where = (cells >= min(ends)) & (cells <= max(ends))
    text = f"PixelPaddingValue {first}" + ("" if limit is None else f", PixelPaddingRangeLimit {limit}")
    return (where, text) if where.any() else (None, "")


def _whole(value: Any) -> int | None:
    """Return a header's number that a file without VRs gives as bytes."""
    if value is None or value == "" or value == b"":
        return None
    return int.from_bytes(value[:2], "little") if isinstance(value, bytes) else int(value)


def _rescaled(stored: np.ndarray, slope: float | None, intercept: float | None) -> np.ndarray:
    """Return stored values × slope + intercept; a slope of 0, which some files have, is none."""
    slope, intercept = slope or 1.0, intercept or 0.0
    if slope != 1 or intercept != round(intercept):
        return stored * slope + intercept
    if stored.dtype.itemsize > 2:
        return stored if intercept == 0 else stored + intercept
    values = stored.astype(np.int32) + int(intercept)
    is_short = -(2**15) <= values.min() and values.max() < 2**15
    return values.astype(np.int16) if is_short else values
