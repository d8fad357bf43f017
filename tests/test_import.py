"""Importing one's own scans: one slicing axis, one orientation, label values, lists that stay, names, refusals."""

import json

import h5py
import nibabel
import numpy as np
import pytest
from helpers import in_slabs, segment
from test_raw import attributes, run
from test_scans import affine_of, write_nifti

from dataloaders.acdc import DATA_SET
from dataloaders.datasets import find_file, missing_classes, texts_of
from dataloaders.files import read_list, read_text_attributes
from dataloaders.own import read_data_set
from dataloaders.preprocess_pancreas import in_file_order
from dataloaders.scans.convert import write_case
from dataloaders.scans.import_lists import slices_of
from dataloaders.scans.joining import join
from dataloaders.scans.label_values import LabelMap
from dataloaders.scans.preprocessing import Preprocessing, own_slice_axis, prepare
from dataloaders.scans.reading import Scan
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

IMPORT = "../dataloaders/import_nifti.py"
TINY = ("--pre_iterations", 2, "--self_iterations", 2, "--batch_size", 2, "--pre_val_every", 0, "--self_val_every", 0)


def scan_and_label(shape, seed=0, value=1):
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, side) for side in shape], indexing="ij"))
    ball = (grid**2).sum(axis=0) < 0.6 if shape[2] > 1 else (grid[:2] ** 2).sum(axis=0) < 0.4
    image = rng.normal(100, 20, shape) + 300 * ball
    return image.astype(np.int16), (ball * value).astype(np.uint16)


def write_set(folder, cases, labelled=None, value=1):
    """Write cases, name to (shape, sides of the voxels[, orientation]); all but those not in `labelled` have labels."""
    for number, (name, (shape, spacing, *codes)) in enumerate(cases.items()):
        image, label = scan_and_label(shape, number, value)
        affine = affine_of(codes[0] if codes else "LPS", spacing)
        write_nifti(folder / "images" / name, image, affine)
        if labelled is None or name in labelled:
            write_nifti(folder / "labels" / name, label, affine)
    return ("--images", folder / "images", "--labels", folder / "labels", "--output", folder / "out",
            "--normalise", "zscore")  # fmt: skip


def plain(count, shape=(20, 18, 6), spacing=(1.0, 1.0, 3.0)):
    return {f"c{k}": (shape, spacing) for k in range(count)}


# --- one slicing axis, one orientation ---


@pytest.mark.parametrize(
    ("shape", "sides", "axis"),
    [((9, 9, 9), (0.9, 0.9, 5), 2), ((9, 9, 9), (0.9, 0.9, 0.6), 2), ((9, 9, 9), (5, 0.9, 0.9), 0),
     ((9, 9, 9), (1, 1.001, 1), None), ((9, 9, 9), (1, 2, 3), 2), ((9, 1, 9), (1, 1, 4), 1)],
)  # fmt: skip
def test_the_axis_across_which_a_scan_was_sliced(shape, sides, axis):
    assert own_slice_axis(shape, sides) == axis


def test_thick_thin_and_single_slices_lie_across_one_axis(tmp_path):
    thick, thin, single = ((20, 18, 6), (0.9, 0.9, 5.0)), ((20, 18, 30), (0.9, 0.9, 0.6)), ((20, 18, 1), (1, 1, 1))
    cases = {"c0": thick, "c1": thin, "c2": (*thick, "SLP"), "c3": single, "c4": thin, "c5": single}
    cases["c2"] = ((6, 20, 18), (5.0, 0.9, 0.9), "SLP")  # stored otherwise, the same in the world
    flags = write_set(tmp_path, cases, labelled=("c0", "c1", "c3", "c4"))
    text = run(IMPORT, *flags, "--layout", "slices")
    assert "slices lie across z in every case; 2 scans are a single slice" in text
    for name, depth in (("c0", 6), ("c1", 30), ("c2", 6), ("c3", 1)):
        path = tmp_path / "out" / "data" / f"{name}.h5"
        with h5py.File(path) as file:
            assert file["image"].shape == (depth, 18, 20) and file.attrs["orientation"] == "SPL"
        assert read_text_attributes(find_file(tmp_path / "out", f"{name}_slice_1"), "orientation") == ("SPL",)
    assert read_data_set(tmp_path / "out").preprocessing.slice_axis == "z"
    look = ("--dataset", "own", "--root_path", tmp_path / "out", "--figure", tmp_path / "look.png")
    text = run("../dataloaders/check.py", *look)
    assert "slices lie across z" in text and "nothing is wrong" in text


def test_scans_sliced_differently_need_the_flag(tmp_path):
    cases = plain(4) | {"c4": ((20, 6, 18), (1.0, 3.0, 1.0))}
    flags = (*write_set(tmp_path, cases), "--layout", "slices")
    text = run(IMPORT, *flags, fails=True)
    assert "c0.nii.gz (20×18×6 voxels of 1×1×3 mm) is sliced across z" in text and "c4.nii.gz" in text
    assert "give --slice_axis z or y for all" in text and not (tmp_path / "out").exists()
    text = run(IMPORT, *flags, "--slice_axis", "y")
    assert "across y in every case; 4 of 5 scans were themselves sliced across another axis" in text
    assert "was itself sliced" not in text  # one line for all
    shapes = [attributes(tmp_path / "out" / "data" / f"c{k}.h5")[1].shape for k in (0, 4)]
    assert shapes == [(18, 6, 20), (6, 18, 20)]
    run(IMPORT, *flags)  # the axis is kept by the data set
    assert "other preprocessing: give --overwrite" in run(IMPORT, *flags, "--slice_axis", "x", fails=True)
    write_nifti(tmp_path / "images" / "c5", scan_and_label((20, 18, 1))[0], affine_of("LPS", (1, 1, 3)))
    assert "c5.nii.gz is a single slice across z, not y: leave it out" in run(IMPORT, *flags, fails=True)
    assert "--slice_axis z is for 2D data alone" in run(IMPORT, *flags[:-2], "--slice_axis", "z", fails=True)


@pytest.fixture
def heard(caplog):
    """What is logged, whether or not a script has set its logging up before."""
    LOGGER.addHandler(caplog.handler)
    caplog.set_level("INFO", "sdcl")
    yield caplog
    LOGGER.removeHandler(caplog.handler)


def test_prediction_slices_as_the_training_did(heard):
    how = Preprocessing("minmax", layout="slices", slice_axis="z")
    image = scan_and_label((20, 18, 30))[0].astype(np.float32)
    thin = Scan("thin.nii", image, affine_of("LPS", (0.9, 0.9, 0.6)))
    assert prepare(thin, how).array.shape == (30, 18, 20)
    coronal = Scan("coronal.nii", image, affine_of("LPS", (0.9, 5.0, 0.9)))
    assert prepare(coronal, how).array.shape == (30, 18, 20)
    assert "coronal.nii was itself sliced across y" in heard.text
    with pytest.raises(UserError, match="strip.nii is a single slice across y, but slices lie across z here"):
        prepare(Scan("strip.nii", image[:, :1], affine_of("LPS", (1.0, 1.0, 1.0))), how)
    old = Preprocessing.from_dict({"normalise": "minmax", "layout": "slices", "orientation": None})
    assert prepare(Scan("old.nii", image[..., :1], affine_of("LPS", (1.0, 4.0, 1.0))), old).array.shape[0] == 1
    assert "old.nii: its slices lie across z, by its own voxels: the training" in heard.text
    assert "old.nii is taken with its axes as stored, LPS" in heard.text


def acdc_in(folder, codes, image, label):
    """Convert one ACDC frame stored with its axes as the codes say."""
    world = affine_of("LPS", (1.5, 1.5, 10.0))
    for suffix, array in (("", image), ("_gt", label)):
        turned = Scan(None, array, world).oriented(codes)
        write_nifti(folder / "raw" / "patient001" / f"patient001_frame01{suffix}", turned.array, turned.affine)
    run("../dataloaders/preprocess_acdc.py", "--raw", folder / "raw", "--root_path", folder / "acdc")
    return folder / "acdc" / "data" / "patient001_frame01.h5", folder / "raw/patient001/patient001_frame01.nii.gz"


def test_acdc_and_its_prediction_do_not_depend_on_how_a_scan_is_stored(tmp_path):
    image, label = scan_and_label((24, 20, 4), value=3)
    label[:8][label[:8] > 0] = 1
    found, predicted = {}, {}
    for codes in ("LPS", "RAS", "LAS"):
        path, raw = acdc_in(tmp_path / codes, codes, image, label)
        facts, array, mask = attributes(path)
        assert facts["orientation"] == "SPL"
        found[codes] = array, mask
        slices = [find_file(tmp_path / codes / "acdc", f"patient001_frame01_slice_{k}") for k in range(1, 5)]
        how = Preprocessing.from_dict(DATA_SET.facts("argmax", texts_of(slices))["preprocessing"])
        stored = nibabel.load(raw)
        scan = Scan(raw, np.asarray(stored.dataobj, np.float32), stored.affine)

        def infer(networks, volume):  # what depends on where a voxel lies in its slice
            ramp = np.linspace(0, 1, volume.shape[1])[:, None] + np.linspace(0, 1, volume.shape[2])
            p = np.float32(volume * ramp / 2)
            return [np.stack([1 - p, p])]

        result = Scan(None, segment([scan], how, in_slabs(infer), [])[1], stored.affine).oriented("LPS")
        predicted[codes] = result.array
    raw = image.T.astype(float)
    np.testing.assert_allclose(found["LPS"][0], (raw - raw.min()) / np.ptp(raw), atol=1e-6)  # nothing is turned
    np.testing.assert_array_equal(found["LPS"][1], label.T)
    for codes in ("RAS", "LAS"):
        for one, other in zip(found["LPS"], found[codes], strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(predicted[codes], predicted["LPS"], atol=1e-6)


def test_a_run_takes_the_orientation_of_its_training_files(tmp_path):
    bare = DATA_SET.facts("argmax", texts_of([write(tmp_path / "a.h5")]))["preprocessing"]
    assert (bare["orientation"], bare["slice_axis"]) == ("LPS", "z")  # published files say nothing
    old = {key: value for key, value in json.loads(Preprocessing("minmax", None, layout="slices").to_json()).items()
           if key != "slice_axis"}  # fmt: skip
    one, two, three = (
        write(tmp_path / f"{name}.h5", preprocessing=json.dumps(old), orientation=axes)
        for name, axes in (("b", "SAL"), ("c", "SAL"), ("d", "SPL"))
    )
    facts = DATA_SET.facts("argmax", texts_of([one, two]))
    assert facts["preprocessing"]["orientation"] == "LAS" and facts["preprocessing"]["slice_axis"] == "z"
    with pytest.raises(UserError, match="the axes of .*b.h5 point to SAL, those of .*d.h5 to SPL: convert all alike"):
        DATA_SET.facts("argmax", texts_of([one, three]))
    write(tmp_path / "data" / "e.h5", orientation="SPL")  # a slice made before slices said so: its volume's counts
    slice_ = write(tmp_path / "data" / "slices" / "e_slice_1.h5", preprocessing=json.dumps(old))
    assert DATA_SET.facts("argmax", texts_of([slice_]))["preprocessing"]["orientation"] == "LPS"


def test_a_run_of_an_earlier_version_goes_on_and_learns_where_its_axes_point(acdc_phantom, tmp_path):
    flags = ("--root_path", acdc_phantom, "--models_path", tmp_path, "--patch_size", 32, 32, "--labelnum", 2,
             "--batch_size", 2, "--pre_iterations", 1, "--self_iterations", 0)  # fmt: skip
    run("ACDC_train.py", *flags)
    path = next(tmp_path.glob("*/config.json"))
    content = json.loads(path.read_text())
    whole = json.loads(json.dumps(content["task"]))
    del content["task"]["label_values"], content["task"]["preprocessing"]["slice_axis"]
    content["task"]["preprocessing"]["orientation"] = None
    path.write_text(json.dumps(content))
    run("ACDC_train.py", *flags)
    assert json.loads(path.read_text())["task"] == whole
    content["task"]["preprocessing"]["orientation"] = "RAS"
    path.write_text(json.dumps(content))
    assert "preprocessed in another way" in run("ACDC_train.py", *flags, fails=True)


def write(path, **attrs):
    write_case(path, np.random.default_rng(0).random((4, 5)), np.ones((4, 5)), attrs)
    return path


def test_published_slices_in_their_files_order_lie_where_they_say():
    image = np.arange(24).reshape(2, 3, 4).astype(np.float32)
    up = Scan("ct", image, affine_of("LPS", (1, 1, 2)), slice_names=("a", "b", "c", "d"))
    down, mixed = (Scan("ct", image, up.affine, slice_names=names) for names in (tuple("dcba"), tuple("badc")))
    assert in_file_order(up) == (up, True)
    turned, is_placed = in_file_order(down)
    assert is_placed and turned.orientation == "LPI"
    np.testing.assert_array_equal(turned.oriented("LPS").array, image)
    np.testing.assert_allclose(turned.oriented("LPS").affine, up.affine)
    assert not in_file_order(mixed)[1]


# --- label values ---


def test_a_single_label_value_is_the_foreground_whatever_its_number(tmp_path):
    flags = write_set(tmp_path, plain(4), value=3)
    assert "class 1, class1: the label 3, in 4 of 4 labels" in run(IMPORT, *flags)
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["label_values"] == [3]


def test_label_values_are_kept_by_the_data_set_and_the_run(tmp_path):
    flags = write_set(tmp_path, plain(4), value=700)
    label = nibabel.load(tmp_path / "labels" / "c0.nii.gz")
    array = np.asarray(label.dataobj).astype(np.uint16)
    array[10:][array[10:] > 0] = 5
    array[0, 0, 0], array[0, 0, 1], array[0, 0, 2] = 7, 9, 6
    write_nifti(tmp_path / "labels" / "c0", array, label.affine)
    text = run(IMPORT, *flags, fails=True)
    assert "the labels hold the values [5, 6, 7, 9, 700], not 1, 2, ...: give --label_values 5 6 7 9 700" in text
    chosen = ("--label_values", 700, 5, "--class_names", "left", "right")
    assert "holds the label 6, which --label_values does not name: add it there, to --merge" in run(
        IMPORT, *flags, *chosen, fails=True
    )
    assert not (tmp_path / "out").exists()
    text = run(IMPORT, *flags, *chosen, "--merge", "6:5", "7:700", "--ignore", 9)
    for part in ("class 1, left: the label 700, in 4 of 4", "class 2, right: the label 5, in 1 of 4",
                 "the label 6 counts as 5, in 1 of 4", "the label 9 becomes background, in 1 of 4"):  # fmt: skip
        assert part in text
    expected = np.select([np.isin(array, (700, 7)), np.isin(array, (5, 6))], [1, 2], 0)
    np.testing.assert_array_equal(attributes(tmp_path / "out" / "data" / "c0.h5")[2], expected)
    data_set = read_data_set(tmp_path / "out")
    assert data_set.label_values == (700, 5)
    paths = [tmp_path / "out" / "data" / f"c{k}.h5" for k in range(4)]
    assert data_set.facts("argmax", texts_of(paths))["label_values"] == [700, 5]
    assert DATA_SET.facts("argmax", texts_of([write(tmp_path / "a.h5")]))["label_values"] == [1, 2, 3]
    text = run(IMPORT, *flags, *chosen, "--merge", "6:5", "7:5", "--ignore", 9, fails=True)
    assert "is of an import with other merge: give --overwrite" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((("5", "5"), (), ()), "--label_values 5 5 must be different numbers from 1 to 65535"),
        (((65536,), (), ()), "--label_values 65536 must be different numbers"),
        (((), ("5-1",), ()), "--merge 5-1 is no pair of numbers: give 5:1"),
        (((), ("0:1",), ()), "--merge 0:1 must be different numbers from 1"),
        (((), ("5:1", "5:2"), ()), "--merge says twice, or together with --ignore, what 5 becomes"),
        (((), ("5:1", "1:2"), ()), "what 1 becomes"),
        (((), ("5:1",), (5,)), "what 5 becomes"),
        (((1, 5), ("5:1",), ()), "--merge takes the value 5 away, which --label_values names"),
        (((1, 9), (), (9,)), "--ignore takes the value 9 away"),
        (((1,), ("5:2",), ()), "--merge makes values 2, which is to become no class: add it to --label_values"),
    ],
)
def test_label_flags_that_contradict_each_other(flags, words):
    with pytest.raises(UserError) as error:
        LabelMap.of(*flags)
    assert words in str(error.value)


def test_a_class_that_nothing_teaches_is_named(tmp_path):
    assert missing_classes([np.array([0, 1]), {0, 3}], DATA_SET) == ["Myo"]
    assert missing_classes([], DATA_SET) == ["RV", "Myo", "LV"]
    text = run(IMPORT, *write_set(tmp_path, plain(4)), "--label_values", 1, 2)
    assert "class 2, class2: the label 2, in 0 of 4 labels: nothing teaches the networks this class" in text


def test_labels_that_are_all_left_out_are_refused(tmp_path):
    flags = write_set(tmp_path, plain(4))
    text = run(IMPORT, *flags, "--ignore", 1, "--label_values", 2, fails=True)
    assert "c0.nii.gz holds nothing but 1, which --ignore leaves out" in text and not (tmp_path / "out").exists()


# --- importing again ---


def lists(root):
    return {path.stem: read_list(path) for path in sorted((root / "data_split").glob("*.txt")) if path.stat().st_size}


def test_importing_again_remakes_what_changed_and_moves_no_case(tmp_path):
    flags = (*write_set(tmp_path, plain(8), labelled=[f"c{k}" for k in range(6)]), "--val_fraction", 0.2)
    run(IMPORT, *flags)
    before, out = lists(tmp_path / "out"), tmp_path / "out" / "data"
    assert len(before["test"]) == len(before["val"]) == 1
    first, second, *_ = before["train_lab"]
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    stored = nibabel.load(tmp_path / "labels" / f"{first}.nii.gz")
    corrected = np.asarray(stored.dataobj).astype(np.uint16)
    corrected[:2] = 1
    write_nifti(tmp_path / "labels" / first, corrected, stored.affine)
    write_nifti(tmp_path / "labels" / "c6", scan_and_label((20, 18, 6), 6)[1], stored.affine)  # labelled since
    image, label = scan_and_label((20, 18, 6), 8)
    write_nifti(tmp_path / "images" / "a0", image, stored.affine)
    write_nifti(tmp_path / "labels" / "a0", label, stored.affine)  # new, and first by name
    (tmp_path / "images" / "c7.nii.gz").unlink()
    text = run(IMPORT, *flags)
    for part in (
        f"the label changed since the conversion of {first}, c6: made again", "new, for training (--resplit divides "
        "anew): a0", "labelled since: c6",
        "no longer among the scans, left out of every list (the converted file stays): c7",
        "the test and validation cases stay", "5 of 8 cases are there already",
    ):  # fmt: skip
        assert part in text
    np.testing.assert_array_equal(attributes(out / f"{first}.h5")[2], corrected)
    after = lists(tmp_path / "out")
    assert (after["test"], after["val"]) == (before["test"], before["val"])
    assert after["train_lab"] == [*before["train_lab"], "c6", "a0"] and "c6" not in after.get("train_unlab", [])
    assert (out / f"{second}.h5").stat().st_mtime_ns == times[f"{second}.h5"]
    (tmp_path / "labels" / f"{before['test'][0]}.nii.gz").unlink()
    text = run(IMPORT, *flags, fails=True)
    assert "of the earlier lists 0 test cases and 6 labelled training cases are left" in text
    text = run(IMPORT, *flags, "--resplit")
    assert before["test"][0] in lists(tmp_path / "out")["train_unlab"]
    text = run(IMPORT, *flags[:-1], 0.4)
    assert "the lists stay as they were divided, not as --test_fraction 0.2, --val_fraction 0.4" in text
    (tmp_path / "test.txt").write_text("\n".join(lists(tmp_path / "out")["train_lab"][:2]))
    text = run(IMPORT, *flags, "--test_list", tmp_path / "test.txt", fails=True)
    assert "the test cases of the earlier import differ in" in text and "give --resplit" in text


def test_files_of_an_earlier_way_are_made_again(tmp_path):
    flags = write_set(tmp_path, plain(4))
    run(IMPORT, *flags)
    (tmp_path / "out" / "dataset.json").unlink()  # as after an import that was refused half-way
    text = run(IMPORT, *flags[:-1], "minmax")
    assert "the way of making it changed since the conversion of c0, c1, c2, c3: made again" in text
    assert attributes(tmp_path / "out" / "data" / "c0.h5")[1].min() == 0
    with h5py.File(tmp_path / "out" / "data" / "c0.h5", "a") as file:
        del file.attrs["source_fingerprint"]  # of a version that kept none
    assert "they do not say, and they stay (--overwrite makes them again): c0" in run(IMPORT, *flags[:-1], "minmax")


def test_raw_files_that_changed_are_converted_again(tmp_path):
    image, label = scan_and_label((24, 20, 4), value=3)
    acdc_in(tmp_path, "LPS", image, label)
    label[:2] = 1
    path, _ = acdc_in(tmp_path, "LPS", image, label)
    np.testing.assert_array_equal(attributes(path)[2], label.T)
    _, picture, structures = attributes(find_file(tmp_path / "acdc", "patient001_frame01_slice_2"))
    np.testing.assert_array_equal(structures, label.T[1])
    assert picture.shape == (20, 24)
    (tmp_path / "raw" / "patient001").rename(tmp_path / "raw" / "patient002")
    for file in (tmp_path / "raw" / "patient002").iterdir():
        file.rename(file.with_name(file.name.replace("001", "002")))
    text = run("../dataloaders/preprocess_acdc.py", "--raw", tmp_path / "raw", "--root_path", tmp_path / "acdc")
    assert f"converted earlier, not among the raw cases now, and left as they are: {path}" in text
    assert "no Info.cfg, so that the frame of the lower number counts as end-diastole: patient002" in text


# --- what is refused, and what works though it looks odd ---


@pytest.mark.slow
def test_odd_names_work_from_import_to_the_test(tmp_path):
    names = ["scan [1]", "scan [2]", "it's, odd", "ünïcode (2)", "a.b.c", "a&b;c", "-r", "#1 50%", "x_$_{$"]
    flags = write_set(tmp_path, {name: ((32, 32, 4), (1.0, 1.0, 3.0)) for name in names})
    run(IMPORT, *flags, "--layout", "slices", "--val_fraction", 0.2)
    root, split = tmp_path / "out", tmp_path / "out" / "data_split"
    for name in names:
        assert slices_of(root, name) == [f"{name}_slice_{k}" for k in range(1, 5)]
    listed = read_list(split / "train.list") + read_list(split / "val.list") + read_list(split / "test.list")
    assert sorted(listed) == sorted(names)
    for part in ("train_slices", "train_lab"):
        assert len(read_list(split / f"{part}.list")) == 4 * len(read_list(split / "train.list"))
    look = ("--dataset", "own", "--root_path", root, "--figure", tmp_path / "look.png")
    assert "nothing is wrong" in run("../dataloaders/check.py", *look)
    where = ("--root_path", root, "--models_path", tmp_path / "m", "--labelnum", 2)
    run("own_train.py", *where, "--patch_size", 32, 32, *TINY)
    assert "class1" in run("test_own.py", *where, "--save_nifti")
    test = read_list(split / "test.list")
    found = next((tmp_path / "m").glob("*/test/*/nifti"))
    assert all((found / f"{name}_prediction.nii.gz").exists() for name in test), list(found.iterdir())


@pytest.mark.parametrize(
    ("name", "fault"),
    [("10:30", "it has the character ':'"), ("scan ", "it begins or ends with a space"), ('a"b', "the character"),
     ("a\u2028b", "the character"), ("a_slice_b", "it contains _slice_")],
)  # fmt: skip
def test_names_that_no_list_can_hold_are_refused_at_import(tmp_path, name, fault):
    flags = write_set(tmp_path, plain(4) | {name: ((20, 18, 4), (1.0, 1.0, 3.0))}, labelled=plain(4))
    text = run(IMPORT, *flags, fails=True)
    assert fault in text and "rename the scan" in text and not (tmp_path / "out").exists()


def test_a_case_that_differs_in_capitals_is_refused(tmp_path):
    flags = write_set(tmp_path, plain(4) | {"C1": plain(1)["c0"]}, labelled=plain(4))
    if len(list((tmp_path / "images").iterdir())) == 5:  # not on a system that ignores them
        assert "differ in capitals alone" in run(IMPORT, *flags, fails=True)


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.nii.gz").touch()
    return folder


@pytest.mark.parametrize(
    ("images", "labels", "refused"),
    [
        (("c1_0000", "c2_0000", "c2_0001"), ("c1",), "the case c1 has no channel 0001, only .*c1_0000.nii.gz: put"),
        (("c1_0000", "c2_0001"), ("c1",), "the case c1 has no channel 0001"),
        (("c1_0000", "c2", "c2_0000"), ("c1",), "c2.nii.gz is another channel or copy of c2_0000"),
        (("s_0000", "s_0001", "s_0002"), ("s_0001",), ""),
        (("s_0001", "s_0002"), ("s_0001",), ""),
        (("a", "b_0001"), ("a",), ""),
    ],
)
def test_channels_are_no_cases(tmp_path, images, labels, refused):
    images, labels = touch(tmp_path / "images", *images), touch(tmp_path / "labels", *labels)
    if refused:
        with pytest.raises(UserError, match=refused):
            join(images, labels)
    else:
        assert set(join(images, labels).files) == {path.name.split(".")[0] for path in images.iterdir()}


@pytest.mark.parametrize("sides", [("0", "1", "1"), ("-1", "1", "1"), ("1000", "1", "1"), ("nan", "1", "1")])
def test_voxels_of_no_plausible_size_are_refused_before_anything_is_read(tmp_path, sides):
    flags = ("--images", tmp_path, "--labels", tmp_path, "--output", tmp_path / "out", "--normalise", "zscore")
    text = run(IMPORT, *flags, "--spacing_mm", *sides, fails=True)
    assert f"--spacing_mm {' '.join(sides)}: every side must lie within 0.01 and 50 mm" in text


def test_what_resampling_takes_away_is_told_or_refused(tmp_path):
    flags = write_set(tmp_path, plain(4))
    for name in ("c1", "c2"):
        label = nibabel.load(tmp_path / "labels" / f"{name}.nii.gz")
        array = np.asarray(label.dataobj).astype(np.uint16)
        array[array > 0] = 1 if name == "c1" else 0
        array[1, 1, 1] = 2
        write_nifti(tmp_path / "labels" / name, array, label.affine)
    coarse = ("--spacing_mm", 4, 4, 4, "--class_names", "organ", "lesion")
    text = run(IMPORT, *flags, *coarse, fails=True)
    assert "c1: lesion vanishes at --spacing_mm 4 4 4; the case trains without it" in text
    assert "c2.nii.gz vanishes at --spacing_mm 4 4 4: choose finer voxels" in text
    assert not (tmp_path / "out" / "data" / "c2.h5").exists()
    text = run(IMPORT, *flags, "--spacing_mm", 1, 1, 45, "--class_names", "organ", "lesion", fails=True)
    assert "its 6 voxels of 3 mm along z shrink to one of 45 mm: choose finer voxels" in text


def test_a_single_slice_stays_one_when_resampled():
    scan = Scan("one.nii", scan_and_label((20, 18, 1))[0].astype(np.float32), affine_of("LPS", (1.0, 1.0, 8.0)))
    done = prepare(scan, Preprocessing("zscore", spacing_mm=(2.0, 2.0, 2.0)))
    assert done.array.shape == (10, 9, 1) and np.linalg.norm(done.affine[:3, 2]) == 8


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_no_file_of_nan_is_written(tmp_path, value):
    with pytest.raises(UserError, match="a.h5 would hold nan or infinite values and is not written"):
        write_case(tmp_path / "a.h5", np.array([[0.0, value]]), None)
    assert not (tmp_path / "a.h5").exists()


def test_a_ct_of_soft_tissue_alone_needs_a_word(tmp_path):
    flags = (*write_set(tmp_path, plain(4))[:-1], "ct")
    text = run(IMPORT, *flags, fails=True)
    assert "is no CT in HU" in text and "does not seem to lie on its image" not in text
    flags = (*flags, "--trust", "all")
    text = run(IMPORT, *flags, fails=True)
    assert "is no CT in HU" in text and "give the CT itself, or, if it is in HU after all, --trust_hu." in text
    assert "4 cases converted" in run(IMPORT, *flags, "--trust_hu")


def test_flags_that_name_nothing_are_refused(tmp_path):
    flags = write_set(tmp_path, plain(4))
    assert "--trust names c9, which is no labelled case: give c0, c1, c2, c3, or all" in run(
        IMPORT, *flags, "--trust", "c9", fails=True
    )
    assert "--class_names a a names a class twice" in run(IMPORT, *flags, "--class_names", "a", "a", fails=True)
    assert not (tmp_path / "out").exists()


def test_blank_slices_train(tmp_path):
    flags = write_set(tmp_path, plain(5, (32, 32, 6)), labelled=plain(4))
    for path in (tmp_path / "images").iterdir():
        image = nibabel.load(path)
        array = np.asarray(image.dataobj).copy()
        array[..., :2] = 0
        write_nifti(path.with_name(path.name.split(".")[0]), array, image.affine)
    run(IMPORT, *flags, "--layout", "slices")
    where = ("--root_path", tmp_path / "out")
    text = run("../dataloaders/check.py", "--dataset", "own", *where, "--figure", tmp_path / "look.png")
    assert "8 slices hold one value (a margin, or nothing left by a mask) and train so" in text
    run("own_train.py", *where, "--models_path", tmp_path / "m", "--patch_size", 32, 32, *TINY)
    assert "class1" in run("test_own.py", *where, "--models_path", tmp_path / "m")
