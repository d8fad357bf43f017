"""Series that are no single stack: acquisitions between one another, phases, variable spacing, captures beside a CT."""

import numpy as np
import pydicom
import pytest
from test_dicom import change, dataset, enhanced, group, save, with_frames
from test_dicom_values import MR, values, write
from test_scans import picture, write_dicom

from dataloaders.scans.reading import find_scans, read_scan
from sdcl.runs.errors import UserError

CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


def two_acquisitions(folder, tell, offset=1.0, thickness=2):
    """Two acquisitions of four slices 2 mm apart, `offset` mm apart, in one series; `tell` marks slice k of part n."""
    for n, array in enumerate((values(), values() + 1000)):

        def header(k, data, n=n):
            data.ImagePositionPatient = [0, 0, 2 * k + n * offset]
            data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"1.2.{n}.{k}"
            data.InstanceNumber = 1 + k + 4 * n
            if thickness:
                data.SliceThickness = thickness
            tell(n, k, data)

        write(folder / f"{n}", array, kind=MR, change=header)
        for path in (folder / f"{n}").iterdir():
            path.rename(folder / f"{n}_{path.name}")
        (folder / f"{n}").rmdir()
    return folder


def mark(name):
    return lambda n, k, data: setattr(data, name, 1 + n)


@pytest.mark.parametrize("tell", [mark("AcquisitionNumber"), mark("EchoTime"), mark("TemporalPositionIdentifier"),
                                  lambda n, k, data: setattr(data, "AcquisitionTime", f"10101{n}"),
                                  lambda n, k, data: None])  # fmt: skip
@pytest.mark.parametrize("offset", [1.0, 0.7])
def test_acquisitions_half_a_slice_apart_are_two_scans(tmp_path, said, tell, offset):
    two_acquisitions(tmp_path / "p" / "mr", tell, offset)
    found = find_scans(tmp_path)
    assert "its slices are of 2 acquisitions (by " in said()
    scans = [read_scan(path) for path in found.values()]
    for scan, expected in zip(scans, (values(), values() + 1000), strict=True):
        np.testing.assert_array_equal(scan.array, expected)
        np.testing.assert_allclose(scan.spacing_mm, (1, 1, 2))
    with pytest.raises(UserError, match="holds 2 series"):
        read_scan(tmp_path / "p" / "mr")


def test_passes_whose_slices_do_not_overlap_are_one_scan(tmp_path):
    two_acquisitions(tmp_path / "mr", mark("AcquisitionNumber"), thickness=1)
    assert read_scan(tmp_path / "mr").array.shape == (10, 8, 8)


def test_overlapping_slices_of_one_acquisition_are_one_scan(tmp_path):
    def tell(n, k, data):
        data.AcquisitionNumber, data.InstanceNumber = 1, 1 + 2 * k + n

    two_acquisitions(tmp_path / "ct", tell)
    assert read_scan(tmp_path / "ct").array.shape == (10, 8, 8)


def test_acquisitions_within_one_file_are_refused(tmp_path):
    data = enhanced(picture((8, 6, 8)), [(0, 0, 2 * (k % 4) + k // 4) for k in range(8)])
    for k, frame in enumerate(data.PerFrameFunctionalGroupsSequence):
        frame.update(group(FrameContentSequence={"TemporalPositionIndex": 1 + k // 4}))
    save(data, tmp_path / "ct" / "all.dcm")
    with pytest.raises(UserError, match=r"holds 2 acquisitions \(by TemporalPositionIdentifier\)"):
        read_scan(tmp_path / "ct")


@pytest.mark.parametrize("name", ["EchoTime", "TriggerTime", "AcquisitionNumber"])
def test_phases_are_counted_at_each_place(tmp_path, name):
    two_acquisitions(tmp_path / "mr", mark(name), offset=0)
    with pytest.raises(UserError, match=rf"holds 2 pictures at each of its 4 places: several .*they differ in {name}"):
        read_scan(tmp_path / "mr")


def test_phases_of_an_enhanced_file_are_counted(tmp_path):
    save(enhanced(picture((8, 6, 6)), [(0, 0, 2 * (k % 3)) for k in range(6)]), tmp_path / "a" / "all.dcm")
    with pytest.raises(UserError, match="holds 2 pictures at each of its 3 places: several phases"):
        read_scan(tmp_path / "a")


def test_a_cine_of_one_place_is_named(tmp_path):
    write_dicom(tmp_path / "cine", picture(), tags=lambda k: {"0020|0032": "0\\0\\5", "0018|1060": str(40 * k)})
    with pytest.raises(UserError, match="cine or time series of one place .they differ in TriggerTime., no volume"):
        read_scan(tmp_path / "cine")


def test_a_cine_of_many_frames_is_named(tmp_path):
    data = with_frames(picture((8, 6, 6)), "1.2.840.10008.5.1.4.1.1.3.1")
    data.FrameTime = 33
    save(data, tmp_path / "us" / "cine.dcm")
    with pytest.raises(UserError, match="cine.dcm is a cine of 6 frames .FrameTime., no volume: export the frames"):
        read_scan(tmp_path / "us")


def spaced(folder, places):
    array = picture((12, 10, len(places)))
    return write_dicom(folder, array, tags=lambda k: {"0020|0032": f"0\\0\\{places[k]}"})


@pytest.mark.parametrize(
    "places, message",
    [
        ([0, 2, 4, 6, 11, 16, 21, 26], r"variable slice spacing \(2 to 5 mm\).*dcm2niix.*resample"),
        ([0, 1, 2, 3, 4, 6, 8, 10], r"variable slice spacing \(1 to 2 mm\)"),
        ([0, 1, 2.3, 3.1, 4.4, 5.1], "variable slice spacing"),
        ([0, 2, 4, 8, 10, 12], "002.dcm and 003.dcm lie 4 mm apart, other slices 2 mm: 1 slice is missing"),
        ([0, 2, 4, 10, 12, 14], "2 slices are missing"),
        ([*range(12), *range(40, 52)], "lie 29 mm apart, other slices 1 mm: 28 slices are missing"),
        ([*range(20), 80], "lie 61 mm apart, other slices 1 mm: 60 slices are missing"),
        ([0, 2, 4, 4, 6, 8], "lie 0 mm apart, other slices 2 mm: a slice is doubled"),
    ],
)  # fmt: skip
def test_uneven_slices_are_called_what_they_are(tmp_path, places, message):
    with pytest.raises(UserError, match=message):
        read_scan(spaced(tmp_path / "ct", places))


def test_uneven_frames_of_a_file_are_named(tmp_path):
    save(enhanced(picture((8, 6, 6)), [(0, 0, z) for z in (0, 2, 4, 9, 14, 19)]), tmp_path / "a" / "all.dcm")
    with pytest.raises(UserError, match="frame 1 of all.dcm and frame 2 of all.dcm lie 2 mm apart.*variable slice"):
        read_scan(tmp_path / "a")


def capture(folder, number=1, uid="1.2.3.4", **attributes):
    """A secondary capture (8 bits) in the series of a CT."""
    data = dataset(CAPTURE, uid, 90 + number)
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 30, 30, 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation, data.PixelData = 7, 0, bytes(900)
    data.Modality = "CT"
    for name, value in attributes.items():
        setattr(data, name, value)
    return save(data, folder / f"capture{number}.dcm")


def as_report(folder):
    capture(folder)


def as_screens(folder):
    for number in range(4):
        capture(folder, number)


def as_colours(folder):
    colours = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PixelData": bytes(2700)}
    capture(folder, PlanarConfiguration=0, **colours)


def as_an_image_of_a_ct(folder):
    path = capture(folder, ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"])
    data = pydicom.dcmread(path)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    data.save_as(path)


def as_a_series(folder):
    for number in range(4):
        capture(folder, number, uid="1.2.3.99")


@pytest.mark.parametrize("make", [as_report, as_screens, as_colours, as_an_image_of_a_ct, as_a_series])
def test_a_capture_beside_a_ct_is_left_out_by_name(tmp_path, said, make):
    folder = write_dicom(tmp_path / "p1" / "ct", picture() - 500)
    make(folder)
    ((name, path),) = find_scans(tmp_path).items()
    assert "secondary capture" in (text := said()) and "capture1.dcm" in text
    np.testing.assert_array_equal(read_scan(path).array, picture() - 500)
    np.testing.assert_array_equal(read_scan(folder).array, picture() - 500)


def test_a_slice_without_a_place_is_no_capture_of_its_own_series(tmp_path):
    folder = write_dicom(tmp_path / "ct", picture())
    for path in folder.iterdir():
        change(path, ImageType=["DERIVED", "SECONDARY", "AXIAL"])
    change(folder / "005.dcm", ImagePositionPatient=None)
    with pytest.raises(UserError, match="005.dcm does not say where its picture lies"):
        read_scan(folder)


def test_a_scan_that_is_stored_as_captures_is_read(tmp_path):
    folder = write_dicom(tmp_path / "ct", picture())
    for path in folder.iterdir():
        change(path, SOPClassUID=CAPTURE)
    np.testing.assert_array_equal(read_scan(folder).array, picture())


@pytest.mark.parametrize("make", [as_a_series, as_screens])
def test_a_folder_of_captures_alone_is_not_lost(tmp_path, make):
    write_dicom(tmp_path / "a", picture())
    make(tmp_path / "b")
    found = find_scans(tmp_path)
    assert list(found) == ["a", "b"]
    with pytest.raises(UserError, match="does not say where its picture lies"):
        read_scan(found["b"])
