"""Scans below a folder: every one found and named, everything else told."""

import os

import numpy as np
import pytest
from test_dicom import REPORT, change, dataset, save
from test_scans import picture, write_dicom, write_nifti

from dataloaders.scans.reading import find_scans, read_scan
from sdcl.runs.errors import UserError


def depth(path):
    return read_scan(path).array.shape[2]


def test_a_stray_file_beside_patients_hides_none(tmp_path, said):
    for k, name in enumerate(("p1", "p2", "p3")):
        write_dicom(tmp_path / name, picture((12, 10, 6 - k)), uid=f"1.2.{k}")
    write_dicom(tmp_path, picture((12, 10, 1)), uid="1.99", names=["stray.dcm"])
    save(dataset(REPORT), tmp_path / "DICOMDIR")
    scans = find_scans(tmp_path)
    assert {name: depth(path) for name, path in scans.items()} == {"p1": 6, "p2": 5, "p3": 4}
    text = said()
    assert f"{tmp_path}: 1 file that is a single image, no volume, left out: stray.dcm" in text
    assert "1 file that holds no image left out: DICOMDIR" in text


def test_files_hide_no_series(tmp_path):
    write_nifti(tmp_path / "atlas", picture())
    write_dicom(tmp_path / "p1", picture())
    write_dicom(tmp_path / "p2" / "deep", picture())
    assert list(find_scans(tmp_path)) == ["atlas", "p1", "p2"]


def test_files_of_any_depth_have_names_of_their_own(tmp_path):
    for k, name in enumerate(("p1/CT", "p2/CT", "p2/day 2/CT", "top")):
        write_nifti(tmp_path / name, picture(seed=k))
    scans = find_scans(tmp_path)
    assert list(scans) == ["p1_CT", "p2_CT", "p2_day 2_CT", "top"]
    np.testing.assert_array_equal(read_scan(scans["p2_CT"]).array, picture(seed=1))


def test_names_that_would_meet_are_told_apart(tmp_path, said):
    write_nifti(tmp_path / "a_b", picture())
    write_nifti(tmp_path / "a" / "b", picture(seed=1))
    write_dicom(tmp_path / "a_b", picture(seed=2))
    scans = find_scans(tmp_path)
    assert list(scans) == ["a_b", "a_b_2", "a_b_3"] and len(set(scans.values())) == 3
    assert scans == find_scans(tmp_path) and "is called a_b_2, since" in said()


def test_what_is_left_out_is_named(tmp_path, said):
    write_nifti(tmp_path / "scan", picture())
    for name in ("notes.txt", "sub/table.csv", "lonely.img", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no scan")
    for k in range(20):
        (tmp_path / f"x{k}.json").write_text("{}")
    os.symlink(tmp_path / "nowhere", tmp_path / "link.nii.gz")
    os.mkfifo(tmp_path / "pipe.nii")
    assert list(find_scans(tmp_path)) == ["scan"]
    text = said()
    assert "23 files that are of no format that is read here left out: lonely.img, notes.txt, sub/table.csv" in text
    assert "x0.json, x1.json" in text and ", ...\n" in text and "hidden" not in text
    assert "2 files that cannot be opened left out: link.nii.gz, pipe.nii" in text


def test_links_are_followed_once(tmp_path):
    write_dicom(tmp_path / "store" / "ct", picture())
    (tmp_path / "study").mkdir()
    os.symlink(tmp_path / "store" / "ct", tmp_path / "study" / "p1")
    os.symlink(tmp_path / "study", tmp_path / "study" / "circle")
    assert list(find_scans(tmp_path / "study")) == ["p1"]


def test_series_of_one_folder_are_scans_of_their_own(tmp_path, said):
    write_dicom(tmp_path / "p1", picture(), uid="1.1", tags=lambda k: {"0020|0011": "7"})
    names = [f"b{k}.dcm" for k in range(5)]
    write_dicom(tmp_path / "p1", picture((12, 10, 5)), uid="1.2", names=names, tags=lambda k: {"0020|0011": "3"})
    write_dicom(
        tmp_path / "p1", picture((12, 10, 2)), uid="1.3", names=["scout1", "scout2"], direction=(0, 1, 0, 0, 0, -1)
    )
    write_dicom(tmp_path / "p2", picture())
    scans = find_scans(tmp_path)
    assert {name: depth(path) for name, path in scans.items()} == {"p1_series3": 5, "p1_series7": 6, "p2": 6}
    assert "2 files that belong to localisers left out: p1/scout1, p1/scout2" in said()
    assert depth(scans["p1_series3"].files[2]) == 5  # a file stands for its series
    with pytest.raises(UserError, match="p1 holds 2 series .6 images from 000.dcm on and 5 images from b0.dcm on"):
        read_scan(tmp_path / "p1")


def test_a_localiser_is_told_by_its_type(tmp_path, said):
    write_dicom(tmp_path / "p1", picture())
    names = [f"l{k}" for k in range(4)]
    kind = {"0008|0008": "ORIGINAL\\PRIMARY\\LOCALIZER"}
    write_dicom(tmp_path / "p1", picture((12, 10, 4)), names=names, first=100, tags=lambda k: kind)
    ((name, path),) = find_scans(tmp_path).items()
    assert (name, depth(path)) == ("p1", 6) and "4 files that belong to localisers left out" in said()


def test_a_series_spread_over_folders_is_one_scan(tmp_path):
    folder = write_dicom(tmp_path / "p1", picture())
    for k in range(6):
        target = folder / ("a" if k % 2 else "b") / f"{k}.dcm"
        target.parent.mkdir(exist_ok=True)
        (folder / f"{k:03d}.dcm").rename(target)
    write_dicom(tmp_path / "p2", picture(), uid="1.7")
    scans = find_scans(tmp_path)
    assert list(scans) == ["p1", "p2"] and depth(scans["p1"]) == depth(tmp_path / "p1") == 6


def test_patients_with_the_same_identifiers_stay_apart(tmp_path):
    write_dicom(tmp_path / "p1", picture())
    write_dicom(tmp_path / "p2", picture(seed=1))
    scans = find_scans(tmp_path)
    np.testing.assert_array_equal(read_scan(scans["p2"]).array, picture(seed=1))
    for k in range(6):  # other instances, but the same places
        change(tmp_path / "p2" / f"{k:03d}.dcm", SOPInstanceUID=f"1.77.{k}")
    assert {name: depth(path) for name, path in find_scans(tmp_path).items()} == {"p1": 6, "p2": 6}


def test_a_damaged_file_is_refused_with_its_series(tmp_path):
    write_dicom(tmp_path / "p1", picture(), uid="1.1")
    write_dicom(tmp_path / "p2", picture(), uid="1.2")
    (tmp_path / "p1" / "002.dcm").write_bytes((tmp_path / "p1" / "002.dcm").read_bytes()[:200])
    (tmp_path / "p3").mkdir()
    (tmp_path / "p3" / "one.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 60)
    scans = find_scans(tmp_path)
    assert list(scans) == ["p1", "p2", "p3"] and depth(scans["p2"]) == 6
    for name, file in (("p1", "002.dcm"), ("p3", "one.dcm")):
        with pytest.raises(UserError, match=f"{file} (cannot be read|is damaged)"):
            read_scan(scans[name])


@pytest.mark.parametrize("name", ["scan [1]", "a, b", 'say "x"', "10:30", "ends ", "*", "näme"])
def test_odd_names_are_names(tmp_path, name):
    write_nifti(tmp_path / "files" / name, picture())
    write_dicom(tmp_path / "series" / name, picture())
    write_dicom(tmp_path / "series" / "other", picture())
    assert list(find_scans(tmp_path / "files")) == [name]
    assert depth(find_scans(tmp_path / "series")[name]) == 6


def test_endless_names_are_shortened(tmp_path):
    for last in "ab":
        write_nifti(tmp_path / ("x" * 90) / ("y" * 90) / last, picture())
    scans = find_scans(tmp_path)
    assert len(scans) == 2 and all(len(name) < 60 for name in scans)


def test_nothing_but_what_is_left_out(tmp_path, said):
    write_dicom(tmp_path, picture((12, 10, 1)))
    with pytest.raises(UserError, match="holds no scans"):
        find_scans(tmp_path)
    assert "1 file that is a single image" in said()
