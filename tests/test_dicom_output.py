"""Predictions as DICOM segmentations: the NIfTI file's voxels, the series' own identity, refusals first."""

from types import SimpleNamespace

import nibabel
import numpy as np
import pydicom
import pytest
from test_dicom import change, enhanced, save
from test_dicom_labels import SHAPE, labels
from test_predict import TILTED, make_run, predicted
from test_scans import picture, write_dicom, write_nifti

from dataloaders.scans.dicom_output import read_sources, save_segmentation
from dataloaders.scans.reading import read_label, read_scan
from sdcl.runs.errors import UserError


@pytest.fixture(scope="module")
def trained(scratch):
    return make_run(scratch / "run", label_values=[5, 7])


def completed(folder, **values):
    for path in folder.iterdir():
        change(path, FrameOfReferenceUID="1.2.9", **values)
    return folder


def same_voxels(path, nifti, values=(0, 5, 7)):
    """Assert that a segmentation, read by highdicom, has each voxel of a NIfTI file where that has it."""
    highdicom = pytest.importorskip("highdicom")
    image = nibabel.load(nifti)
    written = highdicom.seg.segread(path)
    volume = written.get_volume(combine_segments=True)
    there = np.argwhere(np.asarray(volume.array) > 0)
    assert len(there) == (np.asarray(image.dataobj) > 0).sum() > 0
    mm = nibabel.affines.apply_affine(np.diag([-1, -1, 1, 1]) @ volume.affine, there)
    voxels = nibabel.affines.apply_affine(np.linalg.inv(image.affine), mm)
    np.testing.assert_allclose(voxels, voxels.round(), atol=2e-3)
    found = np.asarray(image.dataobj)[tuple(voxels.round().astype(int).T)]
    np.testing.assert_array_equal(found, np.array(values)[volume.array[tuple(there.T)]])
    return written


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_a_prediction_as_a_segmentation_is_the_nifti_file(trained, tmp_path, order):
    pytest.importorskip("highdicom")
    array = picture((32, 40, 8))
    names = [f"{k if order == 'ascending' else 9 - k}.dcm" for k in range(8)]
    folder = completed(write_dicom(tmp_path / "scans" / "p1", array, names=names), SpecificCharacterSet="ISO_IR 100",
                       PatientName="Jürgens^Zoë", PatientSex="U", PatientID="17")  # fmt: skip
    change(folder / names[3], ImageOrientationPatient=[1, 0, 0, 0, 1, 0.0002])  # a rounding
    predicted(trained, folder, tmp_path / "out", "--dicom_seg", "--no-save-figure")
    written = same_voxels(tmp_path / "out" / "p1_prediction.dcm", tmp_path / "out" / "p1_prediction.nii.gz")
    assert [s.SegmentLabel for s in written.SegmentSequence] == ["heart", "liver, left"]
    assert str(written.PatientName) == "Jürgens^Zoë" and written.PatientID == "17"
    assert written.ReferencedSeriesSequence[0].SeriesInstanceUID == "1.2.3.4"
    position = {
        str(pydicom.dcmread(p).SOPInstanceUID): pydicom.dcmread(p).ImagePositionPatient for p in folder.iterdir()
    }
    for frame in written.PerFrameFunctionalGroupsSequence:
        source = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        np.testing.assert_allclose(frame.PlanePositionSequence[0].ImagePositionPatient, position[source], atol=1e-6)
    label = read_label(tmp_path / "out" / "p1_prediction.dcm", onto=read_scan(folder))  # and it is a label again
    of_values = np.array([0, 5, 7])[label.array]
    np.testing.assert_array_equal(
        of_values, np.asarray(nibabel.load(tmp_path / "out" / "p1_prediction.nii.gz").dataobj)
    )


def test_a_tilted_gantry_and_frames_of_one_file_have_segmentations(trained, tmp_path):
    pytest.importorskip("highdicom")
    completed(write_dicom(tmp_path / "scans" / "tilted", picture((12, 40, 20)), direction=TILTED))
    array, order = picture((32, 40, 6)), (3, 0, 5, 1, 4, 2)
    data = enhanced(array[:, :, list(order)], [(-50, -40, 2.5 * k) for k in order])
    save(data, tmp_path / "scans" / "frames" / "all.dcm")
    completed(tmp_path / "scans" / "frames")
    predicted(trained, tmp_path / "scans", tmp_path / "out", "--dicom_seg", "--no-save-figure")
    for name in ("tilted", "frames"):
        same_voxels(tmp_path / "out" / f"{name}_prediction.dcm", tmp_path / "out" / f"{name}_prediction.nii.gz")
    frame = pydicom.dcmread(tmp_path / "out" / "frames_prediction.dcm").PerFrameFunctionalGroupsSequence[0]
    position = frame.PlanePositionSequence[0].ImagePositionPatient
    number = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber
    assert position[2] == 2.5 * order[number - 1]


def test_what_no_segmentation_can_refer_to_is_refused_first(trained, tmp_path, monkeypatch):
    pytest.importorskip("highdicom")
    write_nifti(tmp_path / "scans" / "a", picture())
    text = predicted(trained, tmp_path / "scans", tmp_path / "out", "--dicom_seg", fails=True)
    assert "a.nii.gz is no DICOM series, which a DICOM segmentation refers to: leave --dicom_seg out" in text
    folder = write_dicom(tmp_path / "ct", picture())
    for path in folder.iterdir():
        change(path, StudyInstanceUID="")
    text = predicted(trained, folder, tmp_path / "out", "--dicom_seg", fails=True)
    assert "has no StudyInstanceUID, by which a segmentation refers to it" in text and not (tmp_path / "out").exists()
    for k in range(2):
        part = enhanced(picture((32, 40, 2)), [(-50, -40, 2 * (2 * k + z)) for z in (0, 1)], number=k)
        part.FrameOfReferenceUID = "1.2.9"
        save(part, tmp_path / "slabs" / f"{k}.dcm")
    text = predicted(trained, tmp_path / "slabs", tmp_path / "out", "--dicom_seg", fails=True)
    assert "consists of several multi-frame files" in text
    monkeypatch.setattr("dataloaders.scans.dicom_output.find_spec", lambda name: None)
    text = predicted(trained, folder, tmp_path / "out", "--dicom_seg", fails=True)
    assert "--dicom_seg needs the package highdicom: pip install highdicom" in text


def test_a_header_that_no_segmentation_can_hold_is_told(tmp_path):
    pytest.importorskip("highdicom")
    scan = read_scan(completed(write_dicom(tmp_path / "ct", picture()), StudyDate=None))
    sources, made = read_sources(scan), SimpleNamespace(folder=tmp_path / "run", class_names=("a\\b" * 30, "b"))
    save_segmentation(tmp_path / "empty.dcm", scan, np.zeros(SHAPE, np.uint8), sources, made)
    assert len(pydicom.dcmread(tmp_path / "empty.dcm").SegmentSequence[0].SegmentLabel) == 64
    sources[0].FrameOfReferenceUID = "1.2.10"
    with pytest.raises(UserError, match="p.dcm cannot be written, the NIfTI file is there .*correct the headers"):
        save_segmentation(tmp_path / "p.dcm", scan, labels(), sources, made)
    assert not (tmp_path / "p.dcm").exists()


NAME = "Mustermann"  # without ^, about which highdicom warns with the name


def test_no_patients_name_leaves_the_dicom_files(trained, tmp_path, recwarn, capfd):
    pytest.importorskip("highdicom")
    scans, out = tmp_path / "scans", tmp_path / "out"
    completed(write_dicom(scans / "p1", picture((32, 40, 6))), PatientName=NAME, PatientID=NAME)
    image = nibabel.Nifti1Image(picture((32, 40, 6)).astype(np.int16), np.diag([-1.0, -1.0, 2.0, 1.0]))
    for field in ("descrip", "db_name", "aux_file"):
        image.header[field] = NAME.encode()
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", NAME.encode()))
    nibabel.save(image, tmp_path / "p2.nii")
    assert NAME.encode() in (tmp_path / "p2.nii").read_bytes()
    text = predicted(trained, scans / "p1", out, "--dicom_seg") + predicted(trained, tmp_path / "p2.nii", out)
    said = capfd.readouterr()
    assert NAME not in text + said.out + said.err + "".join(str(warning.message) for warning in recwarn)
    assert str(pydicom.dcmread(out / "p1_prediction.dcm").PatientName) == NAME
    for path in out.iterdir():
        content = nibabel.load(path).header.binaryblock if path.suffix == ".gz" else path.read_bytes()
        assert path.suffix == ".dcm" or NAME.encode() not in content, path
        if path.suffix == ".gz":
            assert not nibabel.load(path).header.extensions


def test_an_error_does_not_quote_the_patients_name(tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError(f"Invalid value for VR PN: '{NAME}^Erika'.")

    monkeypatch.setattr("dataloaders.scans.dicom_output._segmentation", fail)
    source = pydicom.Dataset()
    source.PatientName = f"{NAME}^Erika"
    scan = SimpleNamespace(path=tmp_path / "a")
    with pytest.raises(UserError, match="Invalid value for VR PN") as error:
        save_segmentation(tmp_path / "p.dcm", scan, labels(), [source], None)
    assert NAME not in str(error.value) and "Erika" not in str(error.value)
