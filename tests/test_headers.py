"""Headers of NIfTI, NRRD and MetaImage: units, quaternions, compression by content, git-lfs pointers."""

import gzip

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from test_scans import affine_of, picture, write_dicom, write_nifti

from dataloaders.files import read_list, read_sample
from dataloaders.scans.pictures import read_mask, read_picture
from dataloaders.scans.reading import find_scans, read_label, read_scan
from sdcl.runs.errors import UserError


def nrrd(path, units, *, field="space units", gap=b"\n\n"):
    """An NRRD scan of 25×30×50 units a voxel; `units` is the header's text."""
    array = picture((8, 6, 5)).astype("<i2")
    geometry = [
        "space: left-posterior-superior",
        "space directions: (25,0,0) (0,30,0) (0,0,50)",
        "space origin: (1,2,3)",
    ]
    geometry = ["spacings: 25 30 50"] if field == "units" else geometry
    lines = ["NRRD0005", "type: short", "dimension: 3", "sizes: 8 6 5", *geometry, "endian: little", "encoding: raw"]
    path.write_bytes("\n".join([*lines, f"{field}: {units}"]).encode() + gap + array.tobytes("F"))
    return path


@pytest.mark.parametrize(
    "units, factor",
    [
        ('"um" "um" "um"', 1e-3), ('"microns" "microns" "microns"', 1e-3), ('"\u00b5m" "\u00b5m" "\u00b5m"', 1e-3),
        ('"mm" "mm" "mm"', 1), ('"" "" ""', 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("field", ["space units", "units"])
def test_units_of_nrrd_count(tmp_path, said, units, factor, field):
    scan = read_scan(nrrd(tmp_path / "a.nrrd", units, field=field))
    np.testing.assert_allclose(scan.spacing_mm, np.multiply((25, 30, 50), factor))
    if field == "space units":
        np.testing.assert_allclose(scan.affine[:3, 3], np.multiply((-1, -2, 3), factor))
    assert ("are converted to mm" in said()) == (factor != 1)


def test_units_of_a_label_and_of_each_axis_count(tmp_path):
    path = nrrd(tmp_path / "a.nrrd", '"um" "um" "mm"')
    np.testing.assert_allclose(read_scan(path).spacing_mm, (0.025, 0.03, 50))
    np.testing.assert_allclose(read_label(path).spacing_mm, (0.025, 0.03, 50))


@pytest.mark.parametrize("units, message", [('"m" "m" "m"', "voxels of 2.5e.04×3e.04×5e.04 mm"),
                                            ('"pixel" "pixel" "pixel"', "lengths in 'pixel'")])  # fmt: skip
def test_units_that_cannot_be_are_refused(tmp_path, units, message):
    with pytest.raises(UserError, match=message):
        read_scan(nrrd(tmp_path / "a.nrrd", units))


@pytest.mark.parametrize("suffix", [".mha", ".mhd"])
@pytest.mark.parametrize("unit, factor", [("um", 1e-3), ("cm", 10), ("mm", 1), ("?", 1)])
def test_units_of_metaimage_count(tmp_path, suffix, unit, factor):
    image = sitk.GetImageFromArray(picture((8, 6, 5)).T.astype(np.int16))
    image.SetSpacing((2, 3, 4))
    path = tmp_path / f"a{suffix}"
    sitk.WriteImage(image, str(path))
    line = f"DistanceUnits = {unit}\n".encode()
    path.write_bytes(path.read_bytes().replace(b"ElementDataFile", line + b"ElementDataFile"))
    if unit == "um":
        path.write_bytes(path.read_bytes().replace(b"ElementSpacing = 2 3 4", b"ElementSpacing = 25 30 40"))
    sides = (25, 30, 40) if unit == "um" else (2, 3, 4)
    np.testing.assert_allclose(read_scan(path).spacing_mm, np.multiply(sides, factor))


# --- NIfTI ---


@pytest.mark.parametrize("excess", [1e-8, 3e-7, 1e-5])
@pytest.mark.parametrize("has_sform", [True, False])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_a_quaternion_that_rounding_made_too_long_is_read(tmp_path, said, excess, has_sform, kind):
    affine = affine_of("LPS", (1.5, 1.5, 2.0))
    image = kind(picture().astype(np.int16), affine)
    image.set_qform(affine, 1)
    image.set_sform(affine if has_sform else None, 1 if has_sform else 0)
    image.header["quatern_d"] = 1 + (2 if kind is nibabel.Nifti1Image else 10) * excess
    nibabel.save(image, tmp_path / "a.nii")
    scan = read_scan(tmp_path / "a.nii")
    np.testing.assert_allclose(scan.affine, affine, atol=1e-5)
    np.testing.assert_allclose(scan.header.get_qform(), affine, atol=1e-3)
    text = said()
    if excess > 1e-7:
        assert f"the {'sform' if has_sform else 'rotation nearest to it'} counts" in text


def test_a_quaternion_that_is_no_rotation_gives_way_to_the_sform(tmp_path, said):
    affine = affine_of("LPS", (1.5, 1.5, 2.0))
    image = nibabel.Nifti1Image(picture().astype(np.int16), affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    image.header["quatern_d"] = 3
    nibabel.save(image, tmp_path / "a.nii.gz")
    np.testing.assert_allclose(read_scan(tmp_path / "a.nii.gz").affine, affine)
    assert "the sform counts" in said()


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_compression_is_told_by_content(tmp_path, said, kind):
    image = kind(picture().astype(np.int16), affine_of())
    nibabel.save(image, tmp_path / "a.nii")
    (tmp_path / "b.nii.gz").write_bytes((tmp_path / "a.nii").read_bytes())
    (tmp_path / "c.nii").write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes()))
    for name, text in (("b.nii.gz", "b.nii.gz is not compressed"), ("c.nii", "c.nii is compressed")):
        for scan in (read_scan(tmp_path / name), read_label(tmp_path / name)):
            np.testing.assert_array_equal(scan.array, picture())
            np.testing.assert_allclose(scan.affine, affine_of(), atol=1e-6)
        assert text in said()
    (tmp_path / "b.nii.gz").write_bytes((tmp_path / "a.nii").read_bytes()[:-100])
    with pytest.raises(UserError, match="b.nii.gz cannot be read"):
        read_scan(tmp_path / "b.nii.gz")
    (tmp_path / "b.nii.gz").write_bytes(b"no scan at all")
    with pytest.raises(UserError, match="b.nii.gz cannot be read"):
        read_scan(tmp_path / "b.nii.gz")


# --- git-lfs ---

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


@pytest.mark.parametrize(
    "read, name",
    [
        (read_scan, "a.nii.gz"), (read_label, "a.nii"), (read_scan, "a.nrrd"), (read_scan, "a.mha"),
        (read_scan, "a.mgz"),
        (read_picture, "a.png"), (read_mask, "a.tif"), (read_scan, "a.dcm"), (read_list, "train.txt"),
        (lambda path: read_sample(path, ndim=3, num_classes=2), "a.h5"),
    ],
)  # fmt: skip
def test_a_pointer_of_git_lfs_is_called_that(tmp_path, read, name):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=f"{name} is a git-lfs pointer, not the data: run git lfs pull"):
        read(tmp_path / name)


def test_pointers_in_a_folder_are_named(tmp_path, said):
    write_nifti(tmp_path / "a", picture())
    (tmp_path / "notes.txt").write_bytes(POINTER)
    assert list(find_scans(tmp_path)) == ["a"]
    assert "1 file that is a git-lfs pointer (run git lfs pull) left out: notes.txt" in said()


def test_a_series_of_which_some_files_are_pointers_is_refused(tmp_path):
    folder = write_dicom(tmp_path / "ct", picture())
    (folder / "005.dcm").write_bytes(POINTER)
    with pytest.raises(UserError, match="005.dcm is a git-lfs pointer"):
        read_scan(find_scans(tmp_path)["ct"])
    with pytest.raises(UserError, match="005.dcm is a git-lfs pointer"):
        read_scan(folder)
