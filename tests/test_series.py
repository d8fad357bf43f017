"""`--series`: which of several DICOM series of a folder is meant, in prediction and in an import."""

import h5py
import numpy as np
import pytest
from test_dicom_labels import labels
from test_import import IMPORT
from test_predict import make_run, predicted
from test_raw import run
from test_scans import picture, write_dicom, write_nifti

from dataloaders.scans.reading import find_scans, read_scan
from dataloaders.scans.sources import files_of
from sdcl.runs.errors import UserError

NUMBER, DESCRIPTION = "0020|0011", "0008|103e"


@pytest.fixture(scope="module")
def trained(scratch):
    return make_run(scratch / "run")


@pytest.fixture
def two_series(tmp_path):
    """Three patients with two series each, in one folder for p0 and in folders of their own for p1 and p2."""
    for k in range(3):
        for number, (name, text) in enumerate((("a", "T1 ax"), ("b", "T2 [fat] ax")), start=1):
            where = f"p{k}/{name}" if k else f"p{k}"
            names = [f"{name}{n}.dcm" for n in range(6)]
            uid = f"1.7.{10 * k + number}"
            tags = {NUMBER: str(number), DESCRIPTION: text}
            write_dicom(
                tmp_path / "images" / where, picture(seed=number), uid=uid, names=names, tags=lambda _, t=tags: t
            )
    return tmp_path / "images"


@pytest.mark.parametrize("wanted", ["t1 AX", "t1*", "*1*"])
def test_a_series_is_chosen_by_its_description(two_series, wanted):
    found = find_scans(two_series, wanted)
    assert list(found) == ["p0", "p1", "p2"]
    for path in found.values():
        np.testing.assert_array_equal(read_scan(path).array, picture(seed=1))
        assert len(files_of(path)) == 6


@pytest.mark.parametrize("wanted", ["T2 [FAT] ax", "*fat*", "*[fat]*"])
def test_letters_of_a_description_are_themselves(two_series, wanted):
    for path in find_scans(two_series, wanted).values():
        np.testing.assert_array_equal(read_scan(path).array, picture(seed=2))


def test_a_series_is_chosen_by_its_identifier(two_series, said):
    assert list(find_scans(two_series, "1.7.12")) == ["p1"]
    assert list(find_scans(two_series, "1.7.1")) == ["p0"]  # a whole one, not the beginning of 1.7.11 and 1.7.12
    text = said()
    assert f"{two_series / 'p2'}: left out, --series 1.7.1 fits none of its series:" in text
    assert 'number 2, "T2 [fat] ax", 12×10×6, 1.7.22' in text
    assert list(find_scans(two_series, "1.7.2")) == ["p0"] and list(find_scans(two_series, "1.7.")) == [
        "p0_series1", "p0_series2", "p1_a", "p1_b", "p2_a", "p2_b",
    ]  # fmt: skip


@pytest.mark.parametrize("wanted, message", [("FLAIR", "fits no series below"), ("T1", "fits no"), (" ", "is empty")])
def test_a_series_that_is_not_there_is_told_with_those_that_are(two_series, wanted, message):
    with pytest.raises(UserError, match=f"--series .*{message}") as error:
        find_scans(two_series, wanted)
    if wanted.strip():
        assert str(error.value).count("\n") == 6 and 'p0: number 1, "T1 ax", 12×10×6, 1.7.1' in str(error.value)


def test_several_series_of_a_folder_are_listed(two_series, said):
    assert len(find_scans(two_series)) == 6
    assert 'p0 holds several series: p0_series2 is number 2, "T2 [fat] ax", 12×10×6, 1.7.2' in said()


def test_an_import_takes_one_series_of_each_patient(two_series, tmp_path):
    affine = read_scan(find_scans(two_series, "T1*")["p1"]).affine
    for k in range(3):
        write_nifti(tmp_path / "labels" / f"p{k}", labels(), affine)
    flags = ("--images", two_series, "--labels", tmp_path / "labels", "--output", tmp_path / "out")
    flags += ("--normalise", "zscore", "--class_names", "a", "b")
    text = run(IMPORT, *flags, "--series", "*ax", fails=True)
    assert "--series *ax fits 2 series of" in text and "p0: give one that fits a single series of each patient" in text
    assert text.count("\n  number ") == 2
    text = run(IMPORT, *flags, "--series", "T1 ax")
    assert "2 labelled, 0 unlabelled, 0 validation and 1 test cases" in text
    with h5py.File(tmp_path / "out" / "data" / "p2.h5") as file:
        np.testing.assert_array_equal(file["label"][:], labels())
    patterns = ("--image_pattern", "*", "--label_pattern", "*.nii.gz", "--series")
    assert "2 labelled" in run(IMPORT, *flags, *patterns, "T2*")
    assert "--series *ax fits 2 series of " in run(IMPORT, *flags, *patterns, "*ax", fails=True)
    text = run(IMPORT, *flags, "--image_pattern", "*/a/a0.dcm", *patterns[2:], "T2*", fails=True)
    assert "--image_pattern names the file" in text


def test_a_table_names_folders_of_which_a_series_is_meant(two_series, tmp_path):
    affine = read_scan(find_scans(two_series, "T1*")["p1"]).affine
    label = write_nifti(tmp_path / "label", labels(), affine)
    for image, fails in (("images/p{}", False), ("images/p0/a0.dcm", True)):
        lines = [f"c{k},{image.format(k)},{label.name}" for k in range(3)]
        (tmp_path / "cases.csv").write_text("\n".join(["case,image,label", *lines]))
        flags = ("--table", tmp_path / "cases.csv", "--output", tmp_path / "out", "--normalise", "zscore")
        text = run(IMPORT, *flags, "--series", "t1 ax", "--class_names", "a", "b", fails=fails)
        assert ("names files alone" if fails else "2 labelled") in text


def test_a_prediction_of_the_series_that_is_meant(trained, two_series, tmp_path):
    predicted(trained, two_series, tmp_path / "out", "--series", "T1 ax", "--no-save-figure")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == [f"p{k}_prediction.nii.gz" for k in range(3)]
    text = predicted(trained, two_series, tmp_path / "none", "--series", "T9", fails=True)
    assert "fits no series below" in text and "T2 [fat] ax" in text
    file = two_series / "p0" / "a0.dcm"
    text = predicted(trained, file, tmp_path / "none", "--series", "T1 ax", fails=True)
    assert "--series chooses among the DICOM series of a folder" in text
