"""DICOM series: what belongs together, what is no image, pictures of many frames, and each refusal."""

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from test_scans import picture, write_dicom

from dataloaders.scans.reading import find_scans, read_scan
from sdcl.runs.errors import UserError

CT, ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1"
REPORT, STRUCTURES, DOSE = (
    "1.2.840.10008.5.1.4.1.1.88.67", "1.2.840.10008.5.1.4.1.1.481.3", "1.2.840.10008.5.1.4.1.1.481.2",
)  # fmt: skip
AXES = [1, 0, 0, 0, 1, 0]


def change(path, **values):
    """Set or, with None, remove attributes of a file."""
    data = pydicom.dcmread(path)
    for key, value in values.items():
        if value is None:
            delattr(data, key)
        else:
            setattr(data, key, value)
    data.save_as(path)


def dataset(kind, uid="1.9", number=1):
    """A data set of a kind (SOP class) without an image."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = kind
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"{uid}.{number}"
    data.SeriesInstanceUID, data.StudyInstanceUID, data.Modality = uid, "1.2.3", "OT"
    return data


def save(data, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def with_frames(array, kind=ENHANCED_CT, uid="1.9", number=1):
    """A data set of several frames (X, Y, count), which does not say where they lie."""
    data = dataset(kind, uid, number)
    data.Columns, data.Rows, data.NumberOfFrames = array.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 1
    data.PixelData = np.ascontiguousarray(array.T.astype("<i2")).tobytes()
    return data


def group(**sequences):
    """A functional group: sequence to its attributes."""
    result = Dataset()
    for name, attributes in sequences.items():
        inside = Dataset()
        for key, value in attributes.items():
            setattr(inside, key, value)
        setattr(result, name, [inside])
    return result


def enhanced(array, positions, spacing=(0.9, 0.8), uid="1.9", number=1):
    """An enhanced CT whose frames lie at the positions, with the intercept -1024."""
    data = with_frames(array + 1024, uid=uid, number=number)
    data.SharedFunctionalGroupsSequence = [
        group(
            PlaneOrientationSequence={"ImageOrientationPatient": AXES},
            PixelMeasuresSequence={"PixelSpacing": list(spacing)},
            PixelValueTransformationSequence={"RescaleIntercept": -1024, "RescaleSlope": 1, "RescaleType": "HU"},
        )
    ]
    data.PerFrameFunctionalGroupsSequence = [
        group(PlanePositionSequence={"ImagePositionPatient": list(position)}) for position in positions
    ]
    return data


# --- what belongs together ---


@pytest.mark.parametrize(
    "tags",
    [
        lambda k: {"0020|0037": "0.99949\\0.0319329\\0\\-0.0319329\\0.99949\\0"} if k > 3
        else {"0020|0037": "0.99951\\0.0313007\\0\\-0.0313007\\0.99951\\0"},
        lambda k: {"0020|0037": f"1\\0\\0\\0\\1\\{0.0005 * (k % 2)}"},
    ],
)  # fmt: skip
def test_last_digits_of_directions_split_no_series(tmp_path, tags):
    assert read_scan(write_dicom(tmp_path / "ct", picture(), tags=tags)).array.shape == picture().shape


def test_last_digits_of_pixel_sides_split_no_series(tmp_path):
    folder = write_dicom(tmp_path / "ct", picture())
    for k in (1, 4):
        change(folder / f"{k:03d}.dcm", PixelSpacing=[0.800049, 0.800051])
    scan = read_scan(folder)
    assert scan.array.shape == picture().shape
    np.testing.assert_allclose(scan.spacing_mm, (0.8, 0.8, 2.0), atol=1e-6)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, "000.dcm has other directions .ImageOrientationPatient."),
        ({"PixelSpacing": [0.9, 0.9]}, "000.dcm has other pixel sides .PixelSpacing."),
        ({"Rows": 5}, "000.dcm has 12×5 pixels, other images of its series 12×10"),
        ({"ImagePositionPatient": None}, "000.dcm does not say where its picture lies .ImagePositionPatient."),
        ({"ImagePositionPatient": [0, 0]}, "000.dcm cannot be read"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "000.dcm cannot be read .ImageOrientationPatient is"),
        ({"PixelSpacing": [0, 0.8]}, "000.dcm cannot be read .PixelSpacing is 0 0.8"),
    ],
)
def test_no_image_of_a_series_is_left_out(tmp_path, changed, message):
    folder = write_dicom(tmp_path / "ct", picture())
    change(folder / "000.dcm", **changed)
    for path in (folder, find_scans(tmp_path)["ct"]):
        with pytest.raises(UserError, match=message):
            read_scan(path)


def test_a_cut_file_is_damaged_not_left_out(tmp_path):
    folder = write_dicom(tmp_path / "ct", picture())
    content = (folder / "005.dcm").read_bytes()
    for length in (140, 300, content.rindex(b"\xe0\x7f\x10\x00"), len(content) - 7):
        (folder / "005.dcm").write_bytes(content[:length])
        with pytest.raises(UserError, match="005.dcm (cannot be read|is damaged)"):
            read_scan(folder)


def test_pixels_that_are_not_square_have_their_own_sides(tmp_path):
    folder = write_dicom(tmp_path / "ct", picture(), spacing=(0.5, 0.7, 2.0))
    assert pydicom.dcmread(folder / "000.dcm").PixelSpacing == [0.7, 0.5]  # between rows, then between columns
    np.testing.assert_allclose(read_scan(folder).spacing_mm, (0.5, 0.7, 2.0))


# --- where slices lie ---


def at(positions):
    return lambda k: {"0020|0032": "\\".join(map(str, positions(k)))}


def test_a_tilted_gantry_is_a_shear(tmp_path):
    axes = (1, 0, 0, 0, 0.965926, 0.258819)
    scan = read_scan(write_dicom(tmp_path / "ct", picture(), direction=axes))
    np.testing.assert_allclose(scan.affine @ [0, 0, 5, 1], (50, 40, 10, 1))


@pytest.mark.parametrize(
    "positions, message",
    [
        (lambda k: (-50 + 4 * (k > 2), -40, 2 * k), "from 002.dcm to 003.dcm the slices jump by 4 mm within"),
        (lambda k: (-50 + 3 * (k == 3), -40, 2 * k), "from 00[23].dcm to 00[34].dcm the slices jump by 3 mm"),
        (lambda k: (-50 + 0.045 * k * (5 - k), -40, 2 * k), "lies 0.* mm from where the first and last slice put it"),
        (lambda k: (-50, -40, 2 * k + (0.5 if k == 3 else 0)), "lie 2.5 mm apart, other slices 2 mm"),
    ],
)
def test_slices_that_are_no_straight_stack_are_refused(tmp_path, positions, message):
    with pytest.raises(UserError, match=message):
        read_scan(write_dicom(tmp_path / "ct", picture(), tags=at(positions)))


def test_rounded_positions_are_a_straight_stack(tmp_path):
    folder = write_dicom(tmp_path / "ct", picture(), tags=at(lambda k: (round(-50 + 0.37 * k, 1), -40, 2 * k)))
    assert read_scan(folder).array.shape == picture().shape


# --- what is no image ---


def test_a_report_and_structures_beside_a_scan_are_left_out(tmp_path, said):
    folder = write_dicom(tmp_path / "ct", picture())
    save(dataset(REPORT), folder / "report.dcm")
    np.testing.assert_array_equal(read_scan(folder).array, picture())
    assert f"{folder}: 1 file that holds no image left out: report.dcm" in said()
    save(dataset(STRUCTURES), folder / "structures.dcm")
    save(with_frames(picture(), DOSE), folder / "dose.dcm")
    ((name, path),) = find_scans(folder).items()
    assert name == "ct" and "3 files that hold no image left out: dose.dcm, report.dcm, structures.dcm" in said()
    np.testing.assert_array_equal(read_scan(path).array, picture())


def test_colours_are_refused_by_name(tmp_path):
    folder = write_dicom(tmp_path / "ct", picture())
    change(folder / "003.dcm", SamplesPerPixel=3, PhotometricInterpretation="RGB")
    with pytest.raises(UserError, match="003.dcm holds colours .RGB., not one number a pixel: give the series"):
        read_scan(folder)


# --- pixel spacing ---


def test_no_pixel_spacing_is_never_one_millimetre(tmp_path):
    folder = write_dicom(tmp_path / "ct", picture())
    for path in folder.iterdir():
        change(path, PixelSpacing=None, ImagerPixelSpacing=[0.5, 0.5])
    with pytest.raises(UserError, match="000.dcm has no PixelSpacing.*give --pixel_spacing_mm <between rows>"):
        read_scan(folder)
    np.testing.assert_allclose(read_scan(folder, pixel_spacing_mm=(0.7, 0.6)).spacing_mm, (0.6, 0.7, 2))


# --- many frames ---


def test_an_enhanced_file_is_read_whole_each_frame_at_its_place(tmp_path):
    array, order = picture() - 500, (3, 0, 5, 1, 4, 2)
    frames = [(-50, -40, 2.5 * k) for k in order]
    path = save(enhanced(array[:, :, list(order)], frames), tmp_path / "ct" / "all.dcm")
    for where in (path.parent, path, find_scans(tmp_path)["ct"]):
        scan = read_scan(where)
        np.testing.assert_array_equal(scan.array, array)
        np.testing.assert_allclose(scan.spacing_mm, (0.8, 0.9, 2.5))
        np.testing.assert_allclose(scan.affine[:3, 3], (50, 40, 0))


def test_slabs_of_many_frames_are_one_scan(tmp_path):
    array = picture()
    for k in range(3):
        places = [(-50, -40, 2 * z) for z in (2 * k, 2 * k + 1)]
        save(enhanced(array[:, :, 2 * k : 2 * k + 2], places, number=k), tmp_path / "ct" / f"{k}.dcm")
    scan = read_scan(tmp_path / "ct")
    np.testing.assert_array_equal(scan.array, array)
    np.testing.assert_allclose(scan.affine @ [0, 0, 5, 1], (50, 40, 10, 1))


def test_frames_without_places_are_refused(tmp_path):
    data = with_frames(picture(), CT)
    data.ImagePositionPatient, data.ImageOrientationPatient, data.PixelSpacing = [0, 0, 0], AXES, [1, 1]
    save(data, tmp_path / "ct" / "slab.dcm")
    with pytest.raises(UserError, match="slab.dcm is a multi-frame file .* each of its 6 frames lies.*dcm2niix"):
        read_scan(find_scans(tmp_path)["ct"])


def test_frames_are_scaled_each_in_its_own_way(tmp_path):
    data = enhanced(picture(), [(0, 0, k) for k in range(6)])
    for k, part in enumerate(data.PerFrameFunctionalGroupsSequence):
        part.PixelValueTransformationSequence = [Dataset()]
        part.PixelValueTransformationSequence[0].RescaleSlope = 1 + k % 2
        part.PixelValueTransformationSequence[0].RescaleIntercept = 3
    save(data, tmp_path / "ct" / "pet.dcm")
    slopes = np.array([1, 2, 1, 2, 1, 2])
    np.testing.assert_array_equal(read_scan(tmp_path / "ct").array, (picture() + 1024) * slopes + 3)


def test_fewer_groups_than_frames_are_damage(tmp_path):
    save(enhanced(picture(), [(0, 0, k) for k in range(5)]), tmp_path / "ct" / "cut.dcm")
    with pytest.raises(UserError, match="cut.dcm cannot be read .5 groups for 6 frames"):
        read_scan(tmp_path / "ct")
