"""Raw scans: formats, geometry, and each kind of broken input with its message."""

import gzip
import warnings

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from dataloaders.scans.dicom import check_lengths
from dataloaders.scans.reading import Scan, aligned_label, find_scans, read_label, read_scan
from sdcl.runs.errors import UserError

SHAPE = (12, 10, 6)
ORIENTATIONS = ("LPS", "RAS", "ASL", "PIR", "SRA", "LAI")


def picture(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(np.int16)


def affine_of(codes="RAS", spacing=(1.0, 2.0, 3.0), origin=(5.0, -7.0, 11.0), turn=0.0):
    """An affine whose axes point as the codes say; turned about z by some radians for an oblique one."""
    matrix = np.zeros((3, 3))
    for axis, code in enumerate(codes):
        world = next(k for k, pair in enumerate(("LR", "PA", "IS")) if code in pair)
        matrix[world, axis] = spacing[axis] * (1 if code in "RAS" else -1)
    c, s = np.cos(turn), np.sin(turn)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ matrix, origin
    return affine


def write_nifti(path, array, affine=None, suffix=".nii.gz"):
    path = path.with_name(path.name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine_of() if affine is None else affine), path)
    return path


def write_dicom(
    folder, array, *, spacing=(0.8, 0.8, 2.0), uid="1.2.3.4", first=0, names=None, direction=None, tags=lambda k: {}
):
    """Write a CT series, a file a slice, in HU, stored with the intercept -1024; `tags` changes those of slice k."""
    folder.mkdir(parents=True, exist_ok=True)
    axes = (1, 0, 0, 0, 1, 0) if direction is None else direction
    for k in range(array.shape[2]):
        image = sitk.GetImageFromArray(array[:, :, k].T[None].astype(np.int16))
        image.SetSpacing((*spacing[:2], 1.0))
        all_tags = {
            "0020|000e": uid, "0020|000d": "1.2.3", "0008|0060": "CT", "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0020|0032": f"-50\\-40\\{first + k * spacing[2]}", "0020|0037": "\\".join(map(str, axes)),
            "0028|1052": "-1024", "0028|1053": "1", "0008|0018": f"{uid}.{k + 1}", "0020|0013": str(k + 1),
        } | tags(k)  # fmt: skip
        for key, value in all_tags.items():
            image.SetMetaData(key, value)
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / (names[k] if names else f"{k:03d}.dcm")))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            writer.Execute(image)
    return folder


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.uint8])
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_nifti_of_any_orientation(tmp_path, suffix, dtype, codes):
    array = (picture() % 200).astype(dtype)
    scan = read_scan(write_nifti(tmp_path / "scan", array, affine_of(codes, turn=0.2), suffix))
    np.testing.assert_array_equal(scan.array, array)
    assert scan.array.dtype == np.float32 and scan.orientation == codes
    np.testing.assert_allclose(scan.spacing_mm, (1, 2, 3), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(ORIENTATIONS), st.sampled_from(ORIENTATIONS), st.floats(-0.3, 0.3))
def test_turning_a_scan_moves_no_voxel_in_space(codes, other, turn):
    scan = Scan(None, picture(), affine_of(codes, turn=turn))
    turned = scan.oriented(other)
    assert turned.orientation == other
    voxel = np.array([3, 7, 2, 1])
    there = np.linalg.inv(turned.affine) @ scan.affine @ voxel
    assert turned.array[tuple(there[:3].round().astype(int))] == scan.array[3, 7, 2]
    np.testing.assert_allclose(there, there.round(), atol=1e-9)


def test_nrrd_and_metaimage_are_what_their_nifti_is(tmp_path):
    image = sitk.GetImageFromArray(picture().T)
    image.SetSpacing((1.0, 2.0, 3.0))
    image.SetOrigin((4.0, 5.0, 6.0))
    scans = []
    for suffix in (".nrrd", ".mha", ".nii.gz"):
        sitk.WriteImage(image, str(tmp_path / f"scan{suffix}"))
        scans.append(read_scan(tmp_path / f"scan{suffix}"))
    for scan in scans:
        np.testing.assert_array_equal(scan.array, picture())
        np.testing.assert_allclose(scan.affine, scans[2].affine, atol=1e-5)
        assert scan.orientation == "LPS"


def test_a_volume_of_one_frame_is_a_volume(tmp_path):
    scan = read_scan(write_nifti(tmp_path / "scan", picture()[..., None]))
    np.testing.assert_array_equal(scan.array, picture())


def test_dicom_unsorted_with_a_stray_localiser_and_other_files(tmp_path):
    array = picture() - 500
    folder = write_dicom(tmp_path / "ct" / "study", array, names=["c", "a.dcm", "f", "e", "b", "d"])
    write_dicom(tmp_path / "ct" / "localiser", picture((20, 30, 1)), uid="1.9.9", names=["loc.dcm"])
    (folder / "notes.txt").write_text("no scan")
    scan = read_scan(tmp_path / "ct")
    np.testing.assert_array_equal(scan.array, array)
    np.testing.assert_allclose(scan.spacing_mm, (0.8, 0.8, 2.0))
    np.testing.assert_allclose(scan.affine[:3, 3], (50, 40, 0), atol=1e-6)  # RAS+ of (-50, -40, 0) in LPS
    assert scan.orientation == "LPS"


def test_a_coronal_dicom_series(tmp_path):
    folder = tmp_path / "ct"
    write_dicom(folder, picture(), direction=(1, 0, 0, 0, 0, -1))
    with pytest.raises(UserError, match="lie 0 mm apart"):  # its slices all lie in one coronal plane
        read_scan(folder)


def test_dicom_with_a_slice_missing_or_a_second_series(tmp_path):
    folder = write_dicom(tmp_path / "gap", picture())
    (folder / "003.dcm").unlink()
    with pytest.raises(UserError, match="002.dcm and 004.dcm lie 4 mm apart.*export the series again"):
        read_scan(folder)
    write_dicom(tmp_path / "two", picture())
    write_dicom(tmp_path / "two", picture(), uid="1.5", names=[f"x{k}.dcm" for k in range(6)], first=100)
    with pytest.raises(UserError, match="holds 2 series .6 images from 000.dcm on and 6 .* x0.dcm on.*leave one"):
        read_scan(tmp_path / "two")


def test_scans_of_a_folder(tmp_path):
    for name in ("b", "a"):
        write_nifti(tmp_path / "files" / name, picture())
    assert list(find_scans(tmp_path / "files")) == ["a", "b"]
    for name in ("p1", "p2"):
        write_dicom(tmp_path / "series" / name / "deep", picture())
    assert list(find_scans(tmp_path / "series")) == ["p1", "p2"]
    assert list(find_scans(tmp_path / "series" / "p1")) == ["deep"]  # one case is a case like any other
    assert list(find_scans(tmp_path / "series" / "p1" / "deep")) == ["deep"]
    write_nifti(tmp_path / "files" / "a", picture(), suffix=".nii")
    with pytest.raises(UserError, match="remove or rename"):
        find_scans(tmp_path / "files")


def test_a_label_in_another_orientation_is_laid_on(tmp_path):
    image = read_scan(write_nifti(tmp_path / "scan", picture(), affine_of("LPS")))
    mask = (picture(seed=1) > 500).astype(np.uint8)
    label = Scan(None, mask, image.affine).oriented("SAR")
    path = write_nifti(tmp_path / "label", label.array, label.affine)
    np.testing.assert_array_equal(aligned_label(image, read_label(path)), mask)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m, a: (m[:, :, :-1], a), "has 12×10×5 voxels where .* has 12×10×6"),
        (lambda m, a: (m, a + np.outer([1, 0, 0, 0], [0, 0, 0, 4])), "lies up to 4 mm beside"),
        (lambda m, a: (m, a @ np.diag([1.1, 1, 1, 1])), "lies up to .* mm beside"),
    ],
)
def test_a_label_that_is_not_its_images(tmp_path, change, message):
    image = read_scan(write_nifti(tmp_path / "scan", picture()))
    mask, affine = change((picture() > 500).astype(np.uint8), affine_of())
    with pytest.raises(UserError, match=f"{message}.*resample the label"):
        aligned_label(image, read_label(write_nifti(tmp_path / "label", mask, affine)))


def nan_scan():
    array = picture().astype(np.float32)
    array[3, 3, 3] = np.nan
    return array


def broken(path, change):
    """Return the path of a scan whose bytes were changed."""
    whole = write_nifti(path, picture(), suffix=".nii")
    whole.write_bytes(change(whole.read_bytes()))
    return whole


def bomb(path):
    """Return a small file that declares a huge volume."""
    image = nibabel.Nifti1Image(picture(), affine_of())
    image.header["dim"][1:4] = 4000, 4000, 400
    target = path.with_name("bomb.nii.gz")
    with gzip.open(target, "wb") as file:
        file.write(image.header.binaryblock + b"\0" * 4)
    return target


BAD_SCANS = {
    "missing": (lambda p: p.with_name("none.nii.gz"), "does not exist"),
    "truncated": (lambda p: broken(p, lambda b: b[: len(b) // 2]), "cannot be read"),
    "empty": (lambda p: broken(p, lambda b: b""), "cannot be read"),
    "another format": (lambda p: broken(p, lambda b: b"not a scan " * 99), "cannot be read"),
    "gzip cut short": (lambda p: cut(write_nifti(p, picture())), "cannot be read"),
    "a bomb": (bomb, "declares 6400000000 voxels"),
    "a time series": (lambda p: write_nifti(p, np.stack([picture()] * 2, -1)), "holds 2 volumes"),
    "a line": (lambda p: write_nifti(p, picture()[:, 0, 0]), "must be one volume"),
    "nan": (lambda p: write_nifti(p, nan_scan()), "nan or infinite"),
    "constant": (lambda p: write_nifti(p, np.full(SHAPE, 7, np.int16)), "the value 7 alone"),
    "colours": (lambda p: write_nifti(p, colours()), "one number a voxel"),
    "metres": (lambda p: write_nifti(p, picture(), affine_of(spacing=(0.001, 0.001, 0.001))), "which no scan has"),
    "no geometry": (lambda p: broken(p, without_geometry), "no usable geometry"),
    "a suffix": (lambda p: touched(p.with_name("scan.webp")), "none of .nii"),
    "nrrd": (lambda p: touched(p.with_name("scan.nrrd")), "cannot be read"),
    "an empty folder": (lambda p: p.parent, "no DICOM series"),
}


def without_geometry(content):
    """Zero the affine's third row (srow_z) in a NIfTI-1 header."""
    return content[:312] + b"\0" * 16 + content[328:]


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])
    return path


def colours():
    return np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))


def touched(path):
    path.write_bytes(b"x" * 300)
    return path


@pytest.mark.parametrize("kind", BAD_SCANS)
def test_a_bad_scan_is_named(tmp_path, kind):
    make, message = BAD_SCANS[kind]
    path = make(tmp_path / "scan")
    with pytest.raises(UserError, match=message) as error:
        read_scan(path)
    assert str(path) in str(error.value) and str(error.value).endswith(".") and ": " in str(error.value)


@pytest.mark.parametrize(
    "values, message",
    [((0, 0.5), "holds the label 0.5"), ((0, -1), "label -1"), ((0, 2), "label 2"), ((0, 0), "is empty")],
)
def test_a_bad_label_is_named(tmp_path, values, message):
    array = np.full(SHAPE, values[0], np.float32)
    array[2, 2, 2] = values[1]
    with pytest.raises(UserError, match=message):
        read_label(write_nifti(tmp_path / "label", array), 2)


def with_units(path, unit, spacing):
    image = nibabel.Nifti1Image(picture(), affine_of(spacing=spacing, origin=(spacing[0], 0, 0)))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("unit, factor", [("meter", 1000), ("mm", 1), ("unknown", 1), ("micron", 0.001)])
def test_a_header_s_unit_counts(tmp_path, unit, factor):
    path = with_units(tmp_path / "scan.nii.gz", unit, np.array((1, 2, 3)) / factor)
    scan = read_scan(path)
    np.testing.assert_allclose(scan.spacing_mm, (1, 2, 3), rtol=1e-6)
    np.testing.assert_allclose(scan.affine[:3, 3], (1, 0, 0), rtol=1e-6)


@pytest.mark.parametrize("unit, side", [("micron", 1), ("micron", 90000), ("meter", 1), ("mm", 0.001)])
def test_sides_that_no_scan_has_are_refused(tmp_path, unit, side):
    with pytest.raises(UserError, match="which no scan has: correct" + (" the unit" if unit != "mm" else "")):
        read_scan(with_units(tmp_path / "scan.nii.gz", unit, (side,) * 3))


@pytest.mark.parametrize("qform, sform, note", [(0, 0, "does not say how it lies"), (1, 1, "differ by up to 4 mm")])
def test_a_doubtful_geometry_is_told(tmp_path, said, qform, sform, note):
    image = nibabel.Nifti1Image(picture(), affine_of())
    image.set_sform(affine_of(), sform)
    image.set_qform(affine_of(origin=(5, -7, 15)), qform)
    nibabel.save(image, tmp_path / "scan.nii")
    scan = read_scan(tmp_path / "scan.nii")
    assert f"NOTE: {tmp_path / 'scan.nii'}" in (text := said()) and note in text
    if sform:
        np.testing.assert_allclose(scan.affine, affine_of())


def test_freesurfer_files_and_pairs_are_read(tmp_path, said):
    nibabel.save(nibabel.MGHImage(picture(), affine_of("LIA")), tmp_path / "brain.mgz")
    nibabel.save(nibabel.Nifti1Pair(picture(), affine_of("LIA")), tmp_path / "pair.img")
    scans = find_scans(tmp_path)
    assert list(scans) == ["brain", "pair"] and not said()
    for path in scans.values():
        scan = read_scan(path)
        np.testing.assert_array_equal(scan.array, picture())
        np.testing.assert_allclose(scan.affine, affine_of("LIA"), atol=1e-5)
    nibabel.save(nibabel.AnalyzeImage(picture(), affine_of("LAS")), tmp_path / "old.img")
    with pytest.raises(UserError, match="old.hdr is no NIfTI file"):
        read_scan(find_scans(tmp_path)["old"])


def test_labels_a_rounding_error_off_are_whole_numbers(tmp_path):
    array = (picture() % 4).astype(np.float64)
    label = read_label(write_nifti(tmp_path / "label", array * (1 - 3e-5)), 4)
    np.testing.assert_array_equal(label.array, array)
    assert label.array.dtype == np.uint8
    with pytest.raises(UserError, match="holds the label 2.99,"):
        read_label(write_nifti(tmp_path / "far", np.where(array == 3, 2.99, array)), 4)


@pytest.mark.parametrize("largest, dtype", [(255, np.uint8), (256, np.uint16), (1042, np.uint16), (70000, np.int32)])
def test_large_label_numbers_are_kept(tmp_path, largest, dtype):
    array = np.where(picture() > 500, largest, 0).astype(np.int32)
    label = read_label(write_nifti(tmp_path / "label", array), highest=100000)
    np.testing.assert_array_equal(label.array, array)
    assert label.array.dtype == dtype
    if largest > 65535:
        with pytest.raises(UserError, match=f"label {largest}, outside the classes 0 to 65535"):
            read_label(tmp_path / "label.nii.gz")


@pytest.mark.parametrize("syntax", ["implicit", "compressed"])
def test_a_dicom_element_longer_than_its_file_is_refused_unread(tmp_path, syntax):
    folder = write_dicom(tmp_path / "ct", picture())
    path = folder / "002.dcm"
    if syntax == "compressed":  # explicit types, and pixels in fragments
        writer = sitk.ImageFileWriter()
        writer.UseCompressionOn()
        writer.SetFileName(str(path))
        writer.Execute(sitk.Cast(sitk.ReadImage(str(path)), sitk.sitkInt16))
    else:
        assert read_scan(folder).array.shape == picture().shape
    check_lengths(path)
    content = path.read_bytes()
    place = content.rindex(b"\xe0\x7f\x10\x00")  # the pixels' tag, then where their length stands
    place += 4
    if syntax == "compressed":
        place += 4
        assert content[place : place + 4] == b"\xff" * 4
        place = content.index(b"\xfe\xff\x00\xe0", place + 12) + 4  # the first fragment, after the table of offsets
    path.write_bytes(content[:place] + b"\xfe\xff\xff\xff" + content[place + 4 :])
    with pytest.raises(UserError, match=r"002.dcm is damaged: its element \(....,....\) says it has 4294967294 bytes"):
        check_lengths(path) if syntax == "compressed" else read_scan(folder)
