"""The doctor of a data set: one line a kind of fault, known duplicates, classes, slices and volumes that are thin."""

import dataclasses
import shutil
from pathlib import Path

import h5py
import numpy as np
from test_import import IMPORT, plain, scan_and_label, write_set
from test_raw import run

from dataloaders import pancreas
from dataloaders.acdc import DATA_SET
from dataloaders.check import drawable
from dataloaders.datasets import SLICE, find_file
from dataloaders.files import read_list
from dataloaders.findings import Finding, doubles, remarks
from dataloaders.scans.preprocessing import Preprocessing
from sdcl.scoring.evaluation import Case


def examined(root, figure, dataset="acdc", fails=False):
    return run("../dataloaders/check.py", "--dataset", dataset, "--root_path", root, "--figure", figure, fails=fails)


def lines_of(text):
    return [line for line in text.splitlines() if line.startswith("WRONG")]


def test_one_line_a_kind(acdc_phantom, tmp_path):
    root = shutil.copytree(acdc_phantom, tmp_path / "acdc")
    slices = read_list(root / "data_split" / "train_slices.list")
    for name in slices[:9] + read_list(root / "data_split" / "test.list"):
        find_file(root, name).unlink()
    with h5py.File(find_file(root, slices[10]), "a") as file:
        file["image"][0, 0] = np.nan
    text = examined(root, tmp_path / "a.png", fails=True)
    lines = lines_of(text)
    assert len(lines) == 3 and "12 things are wrong" in text
    assert lines[0].startswith("WRONG, 9 times: ") and f"{slices[0]}.h5 does not exist: restore it" in lines[0]
    assert lines[0].endswith(f"The others: {', '.join(slices[1:6])} and 3 more")
    assert "holds nan" in lines[1] and "WRONG, 2 times: " in lines[2] and "patient006_frame02" in lines[2]


def finding(name, split="train", content="x", low=0.0):
    return Finding(name, split, None, shape=(4, 4), low=low, high=1.0, content=content)


def test_known_duplicates_are_known():
    twice = [finding(f"patient{n}_frame01_slice_{k}", content=str(k)) for n in ("074", "076") for k in (1, 2)]
    assert doubles(twice, DATA_SET) == ([], {DATA_SET.duplicates[0]: 2})
    apart = [twice[0], dataclasses.replace(twice[2], split="test", name="patient076_frame01")]
    problems, known = doubles(apart, DATA_SET)
    assert "hold the same image (train and test): take one out" in problems[0].text and not known
    other = [twice[0], finding("patient001_frame01_slice_1", content="1")]
    assert "patient074_frame01_slice_1 and patient001_frame01_slice_1 hold" in doubles(other, DATA_SET)[0][0].text
    blank = [finding("patient001_frame01_slice_1", low=1.0), finding("patient002_frame01_slice_1", low=1.0)]
    assert doubles(blank, DATA_SET) == ([], {})  # slices of one value are all alike
    (remark,) = remarks(twice, doubles(twice, DATA_SET)[1], Path("none"), DATA_SET)
    assert remark.startswith("known: patient074 and patient076, 2 files each: the same images, labelled twice")


def test_pancreas_duplicates_are_named_where_a_list_has_one():
    ct = pancreas.DATA_SET
    assert doubles([finding("data0001")], ct) == ([], {})
    assert doubles([finding("data0070")], ct) == ([], {ct.duplicates[0]: 0})


def test_a_class_without_a_label_and_a_case_of_empty_slices(acdc_phantom, tmp_path):
    root = shutil.copytree(acdc_phantom, tmp_path / "acdc")
    for path in (root / "data" / "slices").glob("*.h5"):
        with h5py.File(path, "a") as file:
            label = file["label"][()]
            label[label == 2] = 0
            file["label"][...] = 0 if path.name.startswith("patient001_frame02") else label
    text = examined(root, tmp_path / "a.png", fails=True)
    assert "no labelled training case has the class Myo: label one" in text
    assert "patient001_frame02 has an empty label in every slice" in text
    counts = next(line for line in text.splitlines() if line.startswith("classes:"))
    assert "Myo 0" in counts and "RV 0" not in counts


def test_files_that_lie_differently_are_found(acdc_phantom, tmp_path):
    root = shutil.copytree(acdc_phantom, tmp_path / "acdc")
    old = Preprocessing("minmax", None, layout="slices").to_json()
    first = find_file(root, read_list(root / "data_split" / "train_slices.list")[0])
    for odd in (lambda path: path == first, lambda path: SLICE in path.name):  # one slice; all but the volumes
        for path in (root / "data").glob("**/*.h5"):
            with h5py.File(path, "a") as file:
                file.attrs["preprocessing"], file.attrs["orientation"] = old, "SAL" if odd(path) else "SPL"
        text = examined(root, tmp_path / "a.png", fails=True)
        assert "point to SAL, those of" in text and "to SPL: convert all alike" in text


def test_volumes_of_one_slice_are_drawn_and_named(tmp_path):
    flags = write_set(tmp_path, plain(5, (20, 18, 1)))
    for layout in ("volume", "slices"):
        run(IMPORT, *flags, "--layout", layout, "--overwrite")
        text = examined(tmp_path / "out", tmp_path / f"{layout}.png", "own")
        assert "volumes are a single slice" in text and "nothing is wrong" in text
        assert (tmp_path / f"{layout}.png").stat().st_size > 5000
    image, label = scan_and_label((5, 4, 1))
    thick = drawable(Case("a", image, label, None))
    assert thick.image.shape == thick.label.shape == (5, 4, 2)
