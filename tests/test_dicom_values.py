"""Values of DICOM pixels: MONOCHROME1, padding, HighBit, rescales of some slices, lookup tables."""

import numpy as np
import pytest
from pydicom import uid as uids
from pydicom.dataset import Dataset
from test_dicom import AXES, CT, enhanced, save
from test_dicom_pixels import plain

from dataloaders.scans.reading import read_label, read_scan
from sdcl.runs.errors import UserError

MR, PET = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.128"
SYNTAXES = (uids.ImplicitVRLittleEndian, uids.ExplicitVRLittleEndian, uids.ExplicitVRBigEndian, uids.RLELossless)


def values(dtype=np.uint16, seed=0):
    """Four slices (X, Y, 4) of air at 3 to 20 and a body at 300 to 900."""
    rng = np.random.default_rng(seed)
    array = rng.integers(3, 20, (10, 8, 4))
    array[3:7, 2:6] = rng.integers(300, 900, (4, 4, 4))
    return array.astype(dtype)


def write(folder, array, *, kind=MR, syntax=uids.ExplicitVRLittleEndian, stored=None, change=lambda k, data: None):
    """Write cells (X, Y, Z) as a series, a file a slice; `change` edits the header of slice k."""
    for k in range(array.shape[2]):
        native = uids.ExplicitVRLittleEndian if syntax == uids.RLELossless else syntax
        data = plain(np.ascontiguousarray(array[:, :, k].T), native, stored)
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = kind
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"1.2.3.{k}"
        data.SeriesInstanceUID, data.StudyInstanceUID = "1.2.3", "1.2"
        data.ImagePositionPatient, data.ImageOrientationPatient, data.PixelSpacing = [0, 0, 2 * k], AXES, [1, 1]
        change(k, data)
        if syntax == uids.RLELossless:
            data.compress(syntax, generate_instance_uid=False)
        save(data, folder / f"{k}.dcm")
    return folder


def with_header(**attributes):
    def change(_, data):
        for name, value in attributes.items():
            setattr(data, name, value)

    return change


def filled(array, is_padding):
    """What a scan with padding must come to."""
    return np.where(is_padding, array[~is_padding].min(), array)


# --- MONOCHROME1 ---


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("kind, slope, intercept", [(MR, 1, 0), (PET, 0.25, 0), (CT, 1, -1024)])
def test_monochrome1_changes_no_value(tmp_path, kind, slope, intercept, syntax):
    header = with_header(PhotometricInterpretation="MONOCHROME1", RescaleSlope=slope, RescaleIntercept=intercept)
    scan = read_scan(write(tmp_path / "a", values(), kind=kind, syntax=syntax, stored=12, change=header))
    np.testing.assert_array_equal(scan.array, values(float) * slope + intercept)


def test_monochrome1_changes_no_value_of_an_enhanced_file_or_of_compressed_pixels(tmp_path):
    data = enhanced(values(np.int16), [(0, 0, 2 * k) for k in range(4)])
    data.PhotometricInterpretation = "MONOCHROME1"
    save(data, tmp_path / "a" / "all.dcm")
    np.testing.assert_array_equal(read_scan(tmp_path / "a").array, values())

    def compressed(_, data):
        data.PhotometricInterpretation = "MONOCHROME1"
        try:
            data.compress(uids.JPEGLSLossless, generate_instance_uid=False)
        except RuntimeError as error:
            pytest.skip(f"pydicom has no encoder here: {error}")

    np.testing.assert_array_equal(read_scan(write(tmp_path / "b", values(), change=compressed)).array, values())


# --- padding ---


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize(
    "dtype, stored, cell, value, vr",
    [
        (np.uint16, 16, 63536, 63536, "US"), (np.uint16, 16, 63536, -2000, "SS"), (np.int16, 16, -2000, 63536, "US"),
        (np.int16, 16, -2000, -2000, "SS"), (np.uint16, 12, 4095, 4095, "US"), (np.uint16, 12, 4095, 4095, "SS"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [MR, CT])
def test_padding_becomes_air(tmp_path, said, kind, dtype, stored, cell, value, vr, syntax):
    def change(_, data):
        data.RescaleSlope, data.RescaleIntercept = 1, -1024 if kind == CT else 0
        data.add_new("PixelPaddingValue", vr, value)

    array = values(dtype)
    is_padding = np.zeros(array.shape, bool)
    is_padding[:2, :2] = True
    cells = np.where(is_padding, cell, array).astype(dtype)
    scan = read_scan(write(tmp_path / "a", cells, kind=kind, syntax=syntax, stored=stored, change=change))
    expected = filled(array.astype(int), is_padding) - (1024 if kind == CT else 0)
    np.testing.assert_array_equal(scan.array, expected)
    assert "5.0 % of its voxels are padding (PixelPaddingValue " in (text := said())
    assert f"and become {expected.min()}, the least of its other values" in text


def test_a_range_of_padding_becomes_air(tmp_path):
    array = values()
    array[0], array[1], array[2] = 60000, 60005, 60011
    header = with_header(PixelPaddingValue=60010, PixelPaddingRangeLimit=60000)
    scan = read_scan(write(tmp_path / "a", array, change=header))
    is_padding = np.zeros(array.shape, bool)
    is_padding[:2] = True
    np.testing.assert_array_equal(scan.array, filled(array, is_padding))


def test_padding_beyond_the_stored_bits_becomes_air(tmp_path):
    """A 12-bit image whose corners are the 16 bits of −2000: cutting them would make 2096 of it."""
    array = values()
    array[0] = 63536

    def change(_, data):
        data.add_new("PixelPaddingValue", "SS", -2000)

    scan = read_scan(write(tmp_path / "a", array, stored=12, change=change))
    assert scan.array[0].max() == scan.array.min() == values()[1:].min()


def test_padding_of_an_enhanced_file_becomes_air(tmp_path):
    array = values(np.int16)
    array[0] = -1976
    data = enhanced(array - 1024, [(0, 0, 2 * k) for k in range(4)])
    data.add_new("PixelPaddingValue", "US", 65536 - 1976)
    save(data, tmp_path / "a" / "all.dcm")
    assert read_scan(tmp_path / "a").array.min() == int(values()[1:].min()) - 1024


def test_padding_of_lossy_pixels_is_left_and_told(tmp_path, said):
    array = values()
    array[0] = 4000
    header = with_header(PixelPaddingValue=4000, LossyImageCompression="01")
    np.testing.assert_array_equal(read_scan(write(tmp_path / "a", array, change=header)).array, array)
    assert "its padding (PixelPaddingValue 4000) is left as stored" in said()


def test_a_label_map_has_no_padding(tmp_path):
    array = (values() > 200).astype(np.uint16)
    folder = write(tmp_path / "a", array, change=with_header(PixelPaddingValue=0))
    np.testing.assert_array_equal(read_label(folder).array, array)


# --- bits and rescales ---


@pytest.mark.parametrize("syntax", SYNTAXES[:3])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_high_bit_shifts_the_values(tmp_path, syntax, dtype):
    array = values(np.int32) - (100 if dtype == np.int16 else 0)
    header = with_header(HighBit=15)
    scan = read_scan(write(tmp_path / "a", (array << 4).astype(dtype), syntax=syntax, stored=12, change=header))
    np.testing.assert_array_equal(scan.array, array)


def test_bits_above_the_stored_ones_count_for_nothing(tmp_path):
    array = values() | 0x4000  # an overlay's bit
    np.testing.assert_array_equal(read_scan(write(tmp_path / "a", array, stored=12)).array, values())


@pytest.mark.parametrize(
    "syntax, highest, message",
    [
        (uids.ExplicitVRLittleEndian, 15, "0.dcm: its HighBit 15 and BitsStored 12 say"),
        (uids.ExplicitVRLittleEndian, 7, "0.dcm has the HighBit 7 for BitsStored 12 of 16, which cannot be"),
        (uids.RLELossless, 15, "0.dcm has the HighBit 15 for BitsStored 12 in compressed pixels"),
    ],
)
def test_an_impossible_high_bit_is_named(tmp_path, syntax, highest, message):
    folder = write(tmp_path / "a", values() | 1, syntax=syntax, stored=12, change=with_header(HighBit=highest))
    with pytest.raises(UserError, match=message):
        read_scan(folder)


@pytest.mark.parametrize("name, value", [("RescaleSlope", 0.5), ("RescaleIntercept", -1024)])
def test_a_rescale_of_some_slices_is_named(tmp_path, name, value):
    def change(k, data):
        data.RescaleSlope, data.RescaleIntercept = 1, 0
        setattr(data, name, value)
        if k == 2:
            del data[name]

    with pytest.raises(UserError, match=f"2.dcm has no {name}, which other images of its series have"):
        read_scan(write(tmp_path / "a", values(), change=change))


def test_each_slice_has_its_own_slope(tmp_path):
    def change(k, data):
        data.RescaleSlope, data.RescaleIntercept = 0.5 * (k + 1), k

    scan = read_scan(write(tmp_path / "a", values(), kind=PET, change=change))
    np.testing.assert_array_equal(scan.array, values() * [0.5, 1, 1.5, 2] + [0, 1, 2, 3])


def test_a_rescale_that_changes_nothing_may_be_missing(tmp_path):
    def change(k, data):
        if k == 2:
            data.RescaleSlope, data.RescaleIntercept = 1, 0

    np.testing.assert_array_equal(read_scan(write(tmp_path / "a", values(), change=change)).array, values())


def test_a_lookup_table_is_named(tmp_path):
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [3, 0, 16])
    table.add_new("LUTData", "US", [5, 6, 7])
    with pytest.raises(UserError, match=r"0.dcm turns its stored values .* \(ModalityLUTSequence\)"):
        read_scan(write(tmp_path / "a", values(), change=with_header(ModalityLUTSequence=[table])))
