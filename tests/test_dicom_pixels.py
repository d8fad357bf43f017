"""Compressed DICOM files: pixels as other decoders have them, or a refusal that names how they are stored."""

import io

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom import uid as uids
from pydicom.encaps import encapsulate, generate_frames
from test_dicom import AXES, CT, change, dataset, save
from test_scans import picture, write_dicom

from dataloaders.scans.reading import read_scan
from sdcl.runs.errors import UserError

JPEG_EXTENDED = {(420, 140): 244, (230, 120): 95}  # row and column to value, as several decoders have it


def shipped(name):
    """Return one of pydicom's own test files, of those that come with it."""
    path = pydicom.data.get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"pydicom does not ship {name} here")
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    return pydicom.dcmread(path)


def stack(folder, data):
    """Write a picture twice, one slice above the other."""
    for k in range(2):
        data.ImagePositionPatient, data.ImageOrientationPatient, data.PixelSpacing = [0, 0, 2 * k], AXES, [1, 1]
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"1.2.3.{k}"
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CT
        data.SeriesInstanceUID, data.StudyInstanceUID = "1.2.3", "1.2"
        save(data, folder / f"{k}.dcm")
    return folder


def plain(array, syntax=uids.ExplicitVRLittleEndian, stored=None):
    """A picture (rows, columns) without compression."""
    data = dataset(CT)
    data.file_meta.TransferSyntaxUID = syntax
    data.Rows, data.Columns = array.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = 8 * array.dtype.itemsize
    data.BitsStored = stored or data.BitsAllocated
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(array.dtype.kind == "i")
    order = ">" if syntax == uids.ExplicitVRBigEndian else "<"
    data.PixelData = array.astype(array.dtype.newbyteorder(order)).tobytes()
    data["PixelData"].VR = "OW"
    return data


def compressed(array, syntax, frame):
    data = plain(array)
    data.file_meta.TransferSyntaxUID = syntax
    data.PixelData = encapsulate([frame])
    data["PixelData"].is_undefined_length = True
    return data


@pytest.mark.parametrize(
    "name",
    [
        "JPEG2000.dcm", "693_J2KI.dcm", "J2K_pixelrep_mismatch.dcm", "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm", "JPEGLSNearLossless_08.dcm", "JPEGLSNearLossless_16.dcm", "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "image_dfl.dcm", "CT_small.dcm",
    ],
)  # fmt: skip
def test_pixels_are_those_of_pydicoms_decoders(tmp_path, name):
    data = shipped(name)
    try:
        expected = pydicom.pixels.apply_rescale(data.pixel_array, data)
    except RuntimeError as error:
        pytest.skip(f"pydicom has no decoder here: {error}")
    scan = read_scan(stack(tmp_path / "ct", data))
    for k in range(2):
        np.testing.assert_array_equal(scan.array[:, :, k].T, expected)


@pytest.mark.parametrize("name", ["JPGExtended.dcm", "JPEG-lossy.dcm"])
def test_twelve_bits_of_jpeg_are_read(tmp_path, name):
    scan = read_scan(stack(tmp_path / "ct", shipped(name)))
    for (row, column), value in JPEG_EXTENDED.items():
        assert scan.array[column, row, 0] == value


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_lossless_jpeg_is_read(tmp_path, dtype):
    array = (picture((20, 16)) % 200).astype(dtype)
    image = sitk.GetImageFromArray(array[None])
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.SetUseCompression(True)
    writer.SetCompressor("JPEG")
    writer.SetFileName(str(tmp_path / "one.dcm"))
    writer.Execute(image)
    data = pydicom.dcmread(tmp_path / "one.dcm")
    assert data.file_meta.TransferSyntaxUID in (uids.JPEGLosslessSV1, uids.JPEGLossless)
    np.testing.assert_array_equal(read_scan(stack(tmp_path / "ct", data)).array[:, :, 1].T, array)


def test_baseline_jpeg_is_read(tmp_path):
    array = np.add.outer(np.arange(40), np.arange(32)).astype(np.uint8)
    coded = io.BytesIO()
    Image.fromarray(array).save(coded, "JPEG", quality=90)
    data = compressed(array, uids.JPEGBaseline8Bit, coded.getvalue())
    scan = read_scan(stack(tmp_path / "ct", data))
    np.testing.assert_allclose(scan.array[:, :, 0].T, np.array(Image.open(io.BytesIO(coded.getvalue()))), atol=1)


@pytest.mark.parametrize("syntax", [uids.RLELossless, uids.JPEGLSLossless])
@pytest.mark.parametrize("dtype, bits", [(np.uint8, 8), (np.int16, 16), (np.uint16, 12), (np.int16, 12)])
def test_whatever_bits_are_stored_are_read(tmp_path, syntax, dtype, bits):
    array = (picture((20, 16)) % 2 ** min(bits - 1, 10) - (50 if np.dtype(dtype).kind == "i" else 0)).astype(dtype)
    data = plain(array, stored=bits)
    try:
        data.compress(syntax, generate_instance_uid=False)
    except RuntimeError as error:
        pytest.skip(f"pydicom has no encoder here: {error}")
    np.testing.assert_array_equal(read_scan(stack(tmp_path / "ct", data)).array[:, :, 0].T, array)


# --- what is refused ---


JPEG_XL = "1.2.840.10008.1.2.4.110"  # which pydicom does not know yet


@pytest.mark.parametrize("syntax", [uids.HTJ2KLossless, uids.JPEG2000MCLossless, uids.MPEG2MPML, JPEG_XL])
def test_what_is_not_decoded_is_refused_by_name(tmp_path, syntax):
    data = compressed(picture((20, 16)), uids.HTJ2KLossless if syntax == JPEG_XL else syntax, b"\xff\x4f" * 80)
    folder = stack(tmp_path / "ct", data)
    if syntax == JPEG_XL:
        for path in folder.iterdir():
            path.write_bytes(path.read_bytes().replace(uids.HTJ2KLossless.encode(), syntax.encode()))
    with pytest.raises(UserError, match="0.dcm is stored as .*, which is not read here: export the series") as error:
        read_scan(folder)
    assert uids.UID(syntax).name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "dtype, stored, syntax, message",
    [
        (np.uint32, 32, uids.ExplicitVRBigEndian, "stores 32 of 32 bits a pixel as Explicit VR Big Endian"),
        (np.uint8, 8, uids.ExplicitVRBigEndian, "stores 8 of 8 bits a pixel as Explicit VR Big Endian"),
        (np.uint32, 24, uids.ExplicitVRLittleEndian, "stores 24 of 32 bits a pixel as Explicit VR Little Endian"),
        (np.uint8, 7, uids.ExplicitVRLittleEndian, "stores 7 of 8 bits a pixel"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(tmp_path, dtype, stored, syntax, message):
    data = plain(picture((20, 16)).astype(dtype), syntax, stored)
    with pytest.raises(UserError, match=f"0.dcm {message}.*which is not read here: export the series again uncomp"):
        read_scan(stack(tmp_path / "ct", data))


@pytest.mark.parametrize(
    "name", ["JPEG2000.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_RLE.dcm", "JPGExtended.dcm"]
)
@pytest.mark.parametrize("share", [0.5, 0.98])
def test_a_cut_stream_is_refused_by_name(tmp_path, name, share):
    data = shipped(name)
    frame = next(generate_frames(data.PixelData, number_of_frames=1))
    data.PixelData = encapsulate([frame[: int(len(frame) * share)]])
    data["PixelData"].is_undefined_length = True
    with pytest.raises(UserError, match="0.dcm: its pixels, stored as .*, cannot be decoded: copy the file") as error:
        read_scan(stack(tmp_path / "ct", data))
    assert data.file_meta.TransferSyntaxUID.name in str(error.value)


def test_one_compressed_slice_that_is_refused_hides_in_no_series(tmp_path):
    folder = write_dicom(tmp_path / "ct", picture())
    change(folder / "003.dcm", BitsStored=11, HighBit=10)  # of 16: read
    assert read_scan(folder).array.shape == picture().shape
    data = pydicom.dcmread(folder / "004.dcm")
    data.file_meta.TransferSyntaxUID = uids.HTJ2K
    data.PixelData = encapsulate([b"\xff\x4f" * 30])
    data["PixelData"].is_undefined_length = True
    data.save_as(folder / "004.dcm")
    with pytest.raises(UserError, match="004.dcm is stored as High-Throughput JPEG 2000"):
        read_scan(folder)
