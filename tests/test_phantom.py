"""The synthetic data look, to every reader, like the real data sets: names, types, ranges, anatomy."""

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy import ndimage

from dataloaders import phantom
from dataloaders.phantom import write_acdc, write_la, write_pancreas
from sdcl.runs.errors import UserError
from sdcl.runs.written_files import RECORD

LA_FOLDER = "2018LA_Seg_Training Set"
WRITERS = {
    "acdc": (write_acdc, {"patients": (3, 1, 1), "labelled_patients": 1}),
    "la": (write_la, {"cases": (3, 1), "labelled_cases": 1, "size": (40, 36, 32)}),
    "pancreas": (write_pancreas, {"cases": (3, 1), "labelled_cases": 1, "size": (40, 40, 36)}),
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """One small copy of each data set."""
    return {
        name: write(tmp_path_factory.mktemp(name) / "set", **sizes, seed=3) for name, (write, sizes) in WRITERS.items()
    }


def read(path):
    with h5py.File(path) as file:
        return file["image"][()], file["label"][()]


def read_list(root, name):
    return (root / "data_split" / name).read_text().splitlines()


def volumes(root, below="data"):
    """Every file below a folder as {relative name: (image, label)}."""
    return {str(path.relative_to(root)): read(path) for path in sorted((root / below).rglob("*.h5"))}


def test_acdc_files_and_lists(roots):
    root = roots["acdc"]
    assert read_list(root, "train.list") == [f"patient00{p}_frame0{f}" for p in (1, 2, 3) for f in (1, 2)]
    assert read_list(root, "val.list") == ["patient004_frame01", "patient004_frame02"]
    assert read_list(root, "test.list") == ["patient005_frame01", "patient005_frame02"]
    slices = read_list(root, "train_slices.list")
    assert slices == [f"patient00{p}_frame0{f}_slice_{k}" for p in (1, 2, 3) for f in (1, 2) for k in range(1, 6)]
    assert read_list(root, "train_lab.list") == slices[:10]
    assert read_list(root, "train_unlab.list") == slices[10:]

    names = [name for part in ("train", "val", "test") for name in read_list(root, f"{part}.list")]
    expected = {f"{name}.h5" for name in names} | {f"slices/{name}.h5" for name in slices}
    assert {path.relative_to(root / "data").as_posix() for path in root.glob("data/**/*.h5")} == expected


def test_acdc_slices_are_the_volume(roots):
    root = roots["acdc"]
    image, label = read(root / "data" / "patient002_frame02.h5")
    for k in range(len(image)):
        slice_image, slice_label = read(root / "data" / "slices" / f"patient002_frame02_slice_{k + 1}.h5")
        np.testing.assert_array_equal(slice_image, image[k])
        np.testing.assert_array_equal(slice_label, label[k])


@pytest.mark.parametrize("name", ["la", "pancreas"])
def test_3d_files_and_lists(roots, name):
    root = roots[name]
    train, test = read_list(root, "train.txt"), read_list(root, "test.txt")
    assert (len(train), len(test)) == (3, 1)
    assert read_list(root, "train_lab.txt") == train[:1]
    assert read_list(root, "train_unlab.txt") == train[1:]
    if name == "pancreas":
        assert train + test == ["data0001", "data0002", "data0003", "data0004"]
        expected = {f"{case}.h5" for case in train + test}
    else:
        assert all(len(case) == 20 and set(case) <= set(phantom.CASE_ALPHABET) for case in train + test)
        expected = {f"{LA_FOLDER}/{case}/mri_norm2.h5" for case in train + test}
    assert {path.relative_to(root / "data").as_posix() for path in root.glob("data/**/*.h5")} == expected


@pytest.mark.parametrize(("name", "labels"), [("acdc", {0, 1, 2, 3}), ("la", {0, 1}), ("pancreas", {0, 1})])
def test_types_ranges_and_labels(roots, name, labels):
    for image, label in volumes(roots[name]).values():
        assert image.dtype == np.float32 and label.dtype == np.uint8
        assert image.shape == label.shape
        assert set(np.unique(label)) == labels
        if name == "la":
            assert abs(image.mean()) < 1e-3 and abs(image.std() - 1) < 1e-3
        else:
            assert image.min() >= 0 and image.max() <= 1
        if name == "acdc" and image.ndim == 3:
            assert image.min() == 0 and image.max() == 1


def test_acdc_left_ventricle_lies_inside_its_wall(roots):
    cross = ndimage.generate_binary_structure(2, 1)
    for _, label in volumes(roots["acdc"], "data/slices").values():
        around = ndimage.binary_dilation(label == 3, cross)
        assert np.isin(label[around], (2, 3)).all()


def test_acdc_objects_are_thick_enough_at_64_pixels(tmp_path):
    root = write_acdc(tmp_path, patients=(8, 0, 0), seed=1)
    for image, label in volumes(root, "data/slices").values():
        small = ndimage.zoom(label, (64 / image.shape[0], 64 / image.shape[1]), order=0)
        to_ventricle = ndimage.distance_transform_edt(small != 3)
        assert to_ventricle[small < 2].min() > 3, "the myocardium is at least 3 pixels thick everywhere"
        assert (small == 3).sum() >= 25
        assert (small == 1).sum() >= 25


def test_acdc_heart_contracts(roots):
    root = roots["acdc"]
    for patient in ("patient001", "patient004"):
        (_, diastole), (_, systole) = (read(root / "data" / f"{patient}_frame0{f}.h5") for f in (1, 2))
        assert (systole == 3).sum() < 0.7 * (diastole == 3).sum()
        assert abs((systole == 2).sum() / (diastole == 2).sum() - 1) < 0.1, "muscle keeps its volume, so it thickens"


@pytest.mark.parametrize("name", ["la", "pancreas"])
def test_3d_targetis_one_piece(roots, name):
    for _, label in volumes(roots[name]).values():
        assert ndimage.label(label)[1] == 1
        assert 0.01 < label.mean() < 0.15


def test_la_can_tell_veins_from_body(tmp_path):
    two = volumes(write_la(tmp_path / "two", cases=(2, 0), size=(40, 36, 32)))
    three = volumes(write_la(tmp_path / "three", cases=(2, 0), size=(40, 36, 32), classes=3))
    assert two.keys() == three.keys()
    for name, (_, label) in three.items():
        assert set(np.unique(label)) == {0, 1, 2}
        np.testing.assert_array_equal(label > 0, two[name][1] > 0)


@pytest.mark.parametrize("name", ["acdc", "la", "pancreas"])
def test_no_intensity_band_solves_it(roots, name):
    for image, label in volumes(roots[name]).values():
        for value in range(1, label.max() + 1):
            target = label == value
            low, high = np.percentile(image[target], (5, 95))
            band = (image >= low) & (image <= high)
            assert 2 * (band & target).sum() / (band.sum() + target.sum()) < 0.7


@pytest.mark.parametrize("name", ["acdc", "la", "pancreas"])
def test_same_seed_same_data_whatever_the_other_cases(roots, name, tmp_path):
    write, sizes = WRITERS[name]
    first = volumes(roots[name])
    fewer = {
        key: min(count, 1) if key.startswith(("train", "val", "labelled")) else count for key, count in sizes.items()
    }
    again = volumes(write(tmp_path / "again", **sizes, seed=3))
    alone = volumes(write(tmp_path / "fewer", **fewer, seed=3))
    other = volumes(write(tmp_path / "other", **fewer, seed=4))
    assert again.keys() == first.keys()
    for key, (image, label) in (*again.items(), *alone.items()):
        if key in first:  # with fewer training cases, a later one may be a test case: no slices, the same volume
            np.testing.assert_array_equal(image, first[key][0])
            np.testing.assert_array_equal(label, first[key][1])
    assert len(alone.keys() & first.keys()) >= 2
    for key in other.keys() & first.keys():
        assert other[key][0].shape != first[key][0].shape or not np.array_equal(other[key][0], first[key][0])


def test_leaves_the_global_generator_alone(tmp_path):
    before = np.random.get_state()[1].copy()
    write_pancreas(tmp_path, cases=(1, 0), labelled_cases=1, size=(32, 32, 32))
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("name", ["acdc", "la", "pancreas"])
@pytest.mark.parametrize("folder", ["data", "data_split"])
def test_refuses_a_folder_with_real_files(name, folder, tmp_path):
    real = tmp_path / folder / "nested" / "real.h5"
    real.parent.mkdir(parents=True)
    real.write_bytes(b"precious")
    with pytest.raises(UserError, match="not synthetic"):
        WRITERS[name][0](tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [real]


def test_writes_again_over_its_own_files_and_into_empty_folders(tmp_path):
    (tmp_path / "data").mkdir()
    for seed in (0, 1):
        write_pancreas(tmp_path, cases=(1, 0), labelled_cases=1, size=(32, 32, 32), seed=seed)
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"data0001.h5", RECORD}


def test_refuses_more_labelled_than_training_cases(tmp_path):
    with pytest.raises(ValueError, match="3 labelled of 2"):
        write_la(tmp_path / "set", cases=(2, 2), labelled_cases=3)
    assert not (tmp_path / "set").exists()


def test_command_line(tmp_path):
    script = Path(phantom.__file__)

    def call(root):
        command = [sys.executable, str(script), "--dataset", "pancreas", "--root_path", str(root), "--seed", "2"]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    done = call(tmp_path / "new")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "8 synthetic pancreas" in done.stdout and "new" in done.stdout

    (tmp_path / "real" / "data").mkdir(parents=True)
    (tmp_path / "real" / "data" / "data0001.h5").touch()
    refused = call(tmp_path / "real")
    assert refused.returncode == 1
    assert "not synthetic" in refused.stderr and "Traceback" not in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
