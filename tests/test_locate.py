"""Locating: boxes and doubts by hand, a small training on phantoms, prediction and preprocessing that crop by it."""

import csv
import json
import shutil
from types import SimpleNamespace

import h5py
import nibabel
import numpy as np
import pytest
import torch
from test_predict import make_run
from test_raw import abdomen, run
from test_scans import ORIENTATIONS, affine_of, write_nifti
from test_scripts import run as run_script

import dataloaders.scans.locating as locating
from dataloaders.files import read_affine, read_sample
from dataloaders.phantom import write_nifti as write_phantoms
from dataloaders.scans import held_out
from dataloaders.scans.joining import Cases
from dataloaders.scans.locating import Facts, Located, Locator, coarsely, located, save_locator
from dataloaders.scans.preprocessing import Preprocessing, prepare_label
from dataloaders.scans.reading import Scan, read_scan
from sdcl.inference import one_window, whole_window
from sdcl.locating import Sample, augmented, train_locator
from sdcl.networks import build_network
from sdcl.runs.errors import UserError

COARSE = Preprocessing("zscore", "LPS", (5.0, 5.0, 5.0))
FACTS = Facts(COARSE, 5.0, (0, 0, 0), (1.0, 8.0), ((10, 30),) * 3, ((False, False),) * 3, ("a", "b"))
QUICK = ("--spacing_mm", 6, "--folds", 2, "--device", "cpu")


def blob(value=0.9, shape=(16, 16, 12)):
    """A probability with one block of 4 x 3 x 2 coarse voxels."""
    probability = np.zeros(shape, np.float32)
    probability[4:8, 5:8, 6:8] = value
    return probability


def grid(codes="LPS", spacing=(1.0, 1.0, 1.0), shape=(80, 80, 60)):
    """A scan, and the affine of its coarse grid."""
    scan = Scan("scan.nii", np.zeros(shape, np.float32), affine_of(codes, spacing))
    scan.array[0, 0, 0] = 1
    return scan, coarsely(scan, COARSE).affine


# --- boxes ---


def test_a_box_has_half_a_coarse_voxel_and_the_margin_on_each_side():
    scan, affine = grid()
    found = located(blob(), affine, scan, FACTS)
    # The block covers 20 to 40, 25 to 40 and 30 to 40; half a voxel is 2.5, the margin 5.
    assert found.box == ((12, 48), (17, 48), (22, 48)) and found.roi == "12 48 17 48 22 48"
    assert found.doubts == () and found.volume_ml == pytest.approx(4 * 3 * 2 * 0.125)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_a_box_counts_the_scans_own_voxels(codes):
    """The block's voxels, put into the scan, lie in the box however its axes point."""
    scan, affine = grid(codes, (1.0, 2.0, 1.5), (60, 40, 50))
    shape = coarsely(scan, COARSE).array.shape
    inside = np.zeros(shape, np.uint8)
    inside[2:4, 3:6, 4:6] = 1
    found = located(inside.astype(np.float32), affine, scan, FACTS)
    box = np.zeros(scan.array.shape, np.uint8)
    box[tuple(slice(*side) for side in found.box)] = 1
    seen = prepare_label(box, scan, COARSE)
    volume = np.prod([end - first for first, end in found.box]) * 3
    assert seen[2:4, 3:6, 4:6].all() and 25 * 30 * 25 <= volume <= 1.5 * 25 * 30 * 25  # up to a voxel more on each side


def test_a_box_reaches_as_far_as_the_scan_and_is_as_wide_as_asked():
    scan, affine = grid(shape=(83, 80, 60))
    probability = np.zeros(coarsely(scan, COARSE).array.shape, np.float32)
    probability[0:4, 5:8, 6:8] = 0.9
    found = located(probability, affine, scan, FACTS)
    assert found.box[0][0] == 0 and any("reaches the scan's right" in doubt for doubt in found.doubts)
    wide = Facts(**{**vars(FACTS), "least_mm": (0.0, 50.0, 999.0)})
    found = located(probability, affine, scan, wide)
    assert found.box[2] == (0, 60) and found.box[1][1] - found.box[1][0] in (50, 51) and found.box[0][0] == 0


def test_what_is_less_sure_counts_where_it_touches_the_structure():
    scan, affine = grid()
    probability = blob()
    probability[8:10, 6, 7] = 0.2
    probability[13, 13, 10] = 0.2
    assert located(probability, affine, scan, FACTS).box == ((12, 58), (17, 48), (22, 48))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p * 0.7, "its mean probability is 0.63"),
        (lambda p: p + np.roll(p, 8, axis=0) * (np.arange(16) < 14)[:, None, None], "another place has 50%"),
        (lambda p: p * (np.arange(16) == 4)[:, None, None] * (np.arange(16) == 5)[:, None], "it has 0.25 ml"),
        (lambda p: np.maximum(p, np.roll(p, 4, axis=0)), "it is 40 mm from right to left, the training cases' 10 to"),
        (lambda p: np.roll(p, 4, axis=2), "it reaches the scan's top, which no training case's does"),
        (lambda p: np.roll(p, -5, axis=1), "it reaches the scan's front"),
    ],
)
def test_doubts(change, words):
    scan, affine = grid()
    narrow = Facts(**{**vars(FACTS), "sides_mm": ((10.0, 25.0),) * 3})
    found = located(change(blob()), affine, scan, narrow)
    assert any(words in doubt for doubt in found.doubts), found.doubts
    assert located(blob(), affine, scan, narrow).doubts == ()


def test_an_edge_that_training_cases_touched_is_no_doubt():
    scan, affine = grid()
    known = Facts(**{**vars(FACTS), "at_edge": ((False, False), (False, False), (False, True))})
    assert located(np.roll(blob(), 4, axis=2), affine, scan, known).doubts == ()


def test_nothing_found_is_refused():
    scan, affine = grid()
    with pytest.raises(UserError, match=r"scan.nii: the locator finds nothing \(its .* is 0.40\).*--roi"):
        located(blob(0.4), affine, scan, FACTS)


# --- what is learned from ---


def labelled(name, patient=None, box=((20, 40), (25, 40), (30, 40)), codes="LPS"):
    scan, affine = grid(codes)
    mask = (blob() > 0).astype(np.uint8)
    return held_out.LabelledScan(name, patient or name, coarsely(scan, COARSE), mask, box, scan)


def test_margins_by_hand(said):
    case = labelled("a", box=((20, 40), (25, 40), (30, 40)))
    found = Located(((12, 45), (26, 80), (0, 40)), (), 1.0)
    expected = {"right": 8, "left": 5, "front": -1, "back": None, "bottom": None, "top": 0}
    assert held_out.margins_mm(found, case) == expected
    turned = held_out.margins_mm(found, labelled("a", codes="RPS"))
    assert (turned["left"], turned["right"]) == (8, 5)
    judged = held_out.Judged("a", expected, 2.0)
    assert judged.least_mm == -1 and not judged.holds and judged.row()["front_mm"] == -1
    assert held_out.margin_of([judged], 10.0) == 11 and held_out.margin_of([], 10.0) == 10
    lost = held_out.Judged("b", {}, refused="nothing")
    assert not lost.holds and held_out.margin_of([lost], 10.0) == 10
    whole = held_out.Judged("c", dict.fromkeys(expected), 9.0)
    assert (
        held_out.summary([whole], 10.0)["whole_scan"] == ["c"] and "NOTE: of 1 of these the box is the whole" in said()
    )
    told = held_out.summary([judged, lost], 10.0)
    assert (told["held"], told["cases"], told["not_held"], told["least_margin_mm"]) == (0, 2, ["a", "b"], -1)


def test_a_patients_cases_are_held_out_together():
    cases = [labelled(f"{patient}{k}", patient) for patient in "abcde" for k in (1, 2)]
    folds = held_out.folds_of(cases, 2, 0)
    assert sorted(case.name for fold in folds for case in fold) == [case.name for case in cases]
    for fold in folds:
        assert len({case.patient for case in fold}) * 2 == len(fold)
    with pytest.raises(UserError, match="--folds is 6, but the cases are of 5 patients"):
        held_out.folds_of(cases, 6, 0)


def test_facts_are_the_training_cases():
    config = SimpleNamespace(normalise="zscore", spacing_mm=5.0, least_mm=(0, 0, 0))
    facts = held_out.facts_of([labelled("a"), labelled("b")], config, 7.0)
    assert facts.volumes_ml == (3.0, 3.0) and facts.sides_mm == ((20, 20), (15, 15), (10, 10))
    assert facts.margin_mm == 7 and not any(map(any, facts.at_edge)) and facts.trained_on == ("a", "b")


def test_a_thin_part_of_a_structure_reaches_as_far_as_the_others(tmp_path):
    label = np.zeros((60, 60, 60), np.uint8)
    label[20:40, 20:40, 20:40] = 1
    label[40:50, 22, 22] = 1  # one voxel wide
    image = np.random.default_rng(0).normal(size=label.shape).astype(np.float32)
    paths = [write_nifti(tmp_path / name, a, affine_of()) for name, a in (("image", image), ("label", label))]
    config = SimpleNamespace(
        pixel_spacing_mm=None,
        label_values=(),
        by_index=False,
        trust=(),
        trust_hu=False,
        normalise="zscore",
        spacing_mm=5.0,
    )
    case = held_out.read_case(("a", "a"), *paths, COARSE, config)
    mm = np.array(read_scan(paths[0]).spacing_mm)
    sides = held_out.measured(case.mask, (5, 5, 5))[1]
    assert case.box == ((20, 50), (20, 40), (20, 40)) and (np.array(sides) >= np.array([30, 20, 20]) * mm).all()


def test_a_window_holds_a_volume_and_suits_the_networks():
    assert whole_window((5, 6, 7)) == (32, 32, 16) and whole_window((48, 33, 10)) == (48, 48, 16)
    seen = []

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            seen.append(x)
            return torch.cat([x, 2 * x], 1)

    volume = np.random.default_rng(0).normal(size=(20, 17, 5)).astype(np.float32)
    found = one_window(Network(), volume)
    assert found.shape == (2, 20, 17, 5) and seen[0].shape == (1, 1, 32, 32, 16) and seen[0].min() == volume.min()
    np.testing.assert_allclose(found[1], 1 / (1 + np.exp(-volume)), atol=1e-6)


def test_augmentation_keeps_the_structure_whole():
    mask = (blob() > 0).astype(np.uint8)
    image = np.random.default_rng(0).normal(size=mask.shape).astype(np.float32) + 5 * mask
    counts, corners = [], set()
    for seed in range(30):
        drawn = augmented(Sample(image, mask), (32, 16, 16), np.random.default_rng(seed))
        again = augmented(Sample(image, mask), (32, 16, 16), np.random.default_rng(seed))
        np.testing.assert_array_equal(drawn.image, again.image)
        assert drawn.image.shape == drawn.mask.shape == (32, 16, 16) and drawn.image.dtype == np.float32
        counts.append(drawn.mask.sum() / mask.sum())
        corners.add(tuple(np.argwhere(drawn.mask)[0]))
        assert drawn.image[drawn.mask > 0].mean() > drawn.image[drawn.mask == 0].mean() + 1
    assert 0.3 < min(counts) and max(counts) < 2 and len(corners) > 15


def test_training_repeats_itself_and_learns_a_bright_block():
    rng, samples = np.random.default_rng(0), []
    for _ in range(4):
        mask = np.roll((blob(shape=(16, 16, 16)) > 0).astype(np.uint8), rng.integers(-3, 4, 3), (0, 1, 2))
        samples.append(Sample((rng.normal(size=mask.shape) + 6 * mask).astype(np.float32), mask))
    settings = SimpleNamespace(seed=3, iterations=20, batch_size=2, base_lr=3e-3, precision="fp32")
    first = train_locator(samples, settings, torch.device("cpu"))
    settings.iterations = 2
    pair = [train_locator(samples, settings, torch.device("cpu")).state_dict() for _ in range(2)]
    assert all(torch.equal(value, pair[1][name]) for name, value in pair[0].items())
    found = one_window(first, samples[0].image)[1] > 0.5
    assert 2 * (found & (samples[0].mask > 0)).sum() / (found.sum() + samples[0].mask.sum()) > 0.6


# --- the script, and what crops by it ---


@pytest.fixture(scope="module")
def raw(scratch):
    """Six labelled atria and two without a label."""
    return write_phantoms(scratch / "raw", cases=8, labelled_cases=6)


@pytest.fixture(scope="module")
def trained(raw, scratch):
    """A locator of some seconds, trained as a user would, and what the script said."""
    where = ("--images", raw / "images", "--labels", raw / "labels", "--output", scratch / "locate")
    done = run_script("locate_train.py", *where, "--normalise", "zscore", *QUICK, "--iterations", 25)
    assert done.returncode == 0, done.stderr
    return scratch / "locate", done.stdout


def test_a_locator_is_trained_and_tells_how_good_it_is(trained):
    folder, output = trained
    assert "2 scans without a label, left out: case_07, case_08" in output and "6 cases of" in output
    told = json.loads((folder / "locator.json").read_text())
    assert told["held_out"]["cases"] == 6 and f"structure in {told['held_out']['held']} of 6 cases" in output
    assert told["facts"]["trained_on"] == [f"case_0{k}" for k in range(1, 7)]
    assert told["facts"]["margin_mm"] >= told["config"]["margin_mm"] == 10
    with open(folder / "held_out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["case"] for row in rows) == [f"case_0{k}" for k in range(1, 7)]
    assert sum(int(row["holds"]) for row in rows) == told["held_out"]["held"] >= 5


def test_a_located_box_is_predicted_and_said(trained, raw, tmp_path):
    folder, model = trained[0], make_run(tmp_path / "run", trained_on_crops=True)
    flags = ("--run", model, "--input", raw / "images" / "case_07.nii.gz", "--no-save_figure")
    text = run("predict.py", *flags, "--output", tmp_path / "a", "--roi", "auto", "--locator", folder)
    roi = text.split("located by locate: --roi ")[1].split(" (")[0].split()
    assert len(roi) == 6 and "expect false findings" not in text
    run("predict.py", *flags, "--output", tmp_path / "b", "--roi", *roi)
    one, other = (np.asarray(nibabel.load(tmp_path / k / "case_07_prediction.nii.gz").dataobj) for k in "ab")
    np.testing.assert_array_equal(one, other)
    label = write_phantoms(tmp_path / "all", cases=7, labelled_cases=7) / "labels" / "case_07.nii.gz"
    where = np.argwhere(np.asarray(nibabel.load(label).dataobj))
    box = np.array(list(map(int, roi))).reshape(3, 2)
    assert (where.min(0) >= box[:, 0]).all() and (where.max(0) < box[:, 1]).all()


def test_a_scan_without_the_structure_is_refused_or_doubted_and_the_others_are_predicted(trained, raw, tmp_path):
    folder, model = trained[0], make_run(tmp_path / "run")
    (tmp_path / "scans").mkdir()
    shutil.copy(raw / "images" / "case_08.nii.gz", tmp_path / "scans")
    noise = np.random.default_rng(0).normal(size=(40, 40, 40)).astype(np.float32)
    write_nifti(tmp_path / "scans" / "noise", noise, affine_of())
    (tmp_path / "scans" / "case_08.nii.gz").rename(tmp_path / "scans" / "z.nii.gz")
    arguments = ("--run", model, "--input", tmp_path / "scans", "--output", tmp_path / "out", "--no-save_figure")
    module_flags = ("--roi", "auto", "--locator", folder)
    done = run_script("predict.py", *arguments, *module_flags)
    assert "the locator finds nothing" in done.stdout or "the locator is unsure" in done.stdout.replace("\n", " ")
    assert (tmp_path / "out" / "z_prediction.nii.gz").exists()


@pytest.fixture
def bright(tmp_path, monkeypatch):
    """A locator for which the structure is what is bright."""
    facts = Facts(**{**vars(FACTS), "volumes_ml": (0.0, 1e6), "sides_mm": ((0.0, 1e4),) * 3, "least_mm": (0, 0, 0)})
    save_locator(tmp_path / "bright", facts, build_network("vnet", 2), "vnet", {})
    monkeypatch.setattr(locating, "one_window", lambda _, volume: np.stack([volume < 1, volume > 1]).astype(np.float32))
    return tmp_path / "bright"


def atrium_scan(folder, name, label=True):
    image = np.random.default_rng(0).integers(0, 20, (150, 140, 40)).astype(np.int16)
    image[40:60, 50:90, 15:25] += 500
    write_nifti(folder / name / "lgemri", image, affine_of("LPS", (0.625,) * 3))
    if label:
        write_nifti(folder / name / "laendo", ((image > 100) * 255).astype(np.uint8), affine_of("LPS", (0.625,) * 3))


def test_la_scans_without_a_label_are_cropped(bright, tmp_path):
    for name, label in (("CASE1", True), ("CASE2", False)):
        atrium_scan(tmp_path / "raw", name, label)
    flags = ("--raw", tmp_path / "raw", "--root_path", tmp_path / "la")
    assert "does not exist" in run("../dataloaders/preprocess_la.py", *flags, fails=True)
    text = run("../dataloaders/preprocess_la.py", *flags, "--locator", bright)
    assert "1 cases without a label, cropped by the locator: CASE2" in text and "train.txt" in text
    assert "CASE2/lgemri.nii.gz: located by bright: --roi" in text
    labelled_path, path = (
        tmp_path / "la" / "data" / "2018LA_Seg_Training Set" / n / "mri_norm2.h5" for n in ("CASE1", "CASE2")
    )
    with h5py.File(path, "r") as file:
        facts, keys = dict(file.attrs), set(file)
    assert keys == {"image"} and facts["label_source"] == "" and facts["located"] == ""
    assert json.loads(facts["crop"])["located_by"] == Locator.read(bright, torch.device("cpu")).digest
    x, y, z = facts["crop_box"].reshape(3, 2)
    assert tuple(z) == (0, 40) and x[0] <= 40 and x[1] >= 60 and 112 <= x[1] - x[0] < 150 and 112 <= y[1] - y[0] <= 140
    sample = read_sample(path, ndim=3, num_classes=2, needs_label=False)
    whole = read_scan(tmp_path / "raw" / "CASE2" / "lgemri.nii.gz").array
    expected = ((whole - whole.mean(dtype=float)) / whole.std(dtype=float))[x[0] : x[1], y[0] : y[1]]
    np.testing.assert_allclose(sample.image, expected, atol=1e-4)
    np.testing.assert_allclose(read_affine(path)[0, 3], read_affine(labelled_path)[0, 3] - 0.625 * (
        x[0] - h5py.File(labelled_path)["image"].parent.attrs["crop_box"][0]), atol=1e-6)  # fmt: skip
    with pytest.raises(UserError, match="label"):
        read_sample(path, ndim=3, num_classes=2)  # as a test reads it
    assert "2 of 2 cases are there already" in run("../dataloaders/preprocess_la.py", *flags, "--locator", bright)
    larger = Facts(**{**vars(FACTS), "volumes_ml": (100.0, 200.0)})
    save_locator(bright, larger, build_network("vnet", 2), "vnet", {})
    text = run("../dataloaders/preprocess_la.py", *flags, "--locator", bright)
    assert "the way of making it changed since the conversion of CASE2" in text
    assert "the locator is unsure (it has" in text and "the training cases' 100 to 200" in text


def test_pancreas_scans_without_a_label_are_cropped(bright, tmp_path):
    image, label = abdomen((120, 110, 60))
    affine = affine_of("LPS", (1.0, 1.0, 2.0))
    for number in (1, 2):
        write_nifti(tmp_path / "ct" / f"PANCREAS_{number:04d}", image, affine)
    write_nifti(tmp_path / "labels" / "label0001", label, affine)
    flags = ("--images", tmp_path / "ct", "--labels", tmp_path / "labels", "--root_path", tmp_path / "out")
    script = "../dataloaders/preprocess_pancreas.py"
    assert "has no label of the number 2" in run(script, *flags, fails=True)
    text = run(script, *flags, "--locator", bright, "--rule", "published", fails=True)
    assert "--locator goes by headers" in text and not (tmp_path / "out").exists()
    text = run(script, *flags, "--locator", bright)
    assert "1 cases without a label, cropped by the locator: data0002" in text
    assert "data0002,PANCREAS_0002.nii.gz,\n" in (tmp_path / "out" / "data" / "cases.csv").read_text()
    with h5py.File(tmp_path / "out" / "data" / "data0002.h5", "r") as file:
        assert set(file) == {"image"} and min(file["image"].shape) >= 96 and file.attrs["label_source"] == ""
        np.testing.assert_allclose(file.attrs["spacing"], 1)


# --- mistakes ---


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--spacing_mm", 0.1), "--spacing_mm is 0.1: a coarse voxel's side must lie within 0.5 and 50 mm"),
        (("--margin_mm", -1), "--margin_mm -1 must be lengths in mm"),
        (("--least_mm", 1, 2, "nan"), "--least_mm 1 2 nan must be lengths"),
        (("--folds", 1), "--folds is 1: it must be 2 or more, or 0"),
        (("--iterations", 0), "--iterations is 0: it must be above 0"),
        (("--folds", 7), "there are 6 labelled cases to learn from, and --folds 7 needs as many"),
        (("--label_values", 3), "has none of --label_values 3"),
        (("--trust", "case_77"), "--trust names case_77, which is no labelled case"),
        (("--batch_size", 0), "--batch_size is 0: it must be above 0"),
        (("--pixel_spacing_mm", 0, 1), "must be two numbers above 0"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(raw, tmp_path, flags, words):
    where = ("--images", raw / "images", "--labels", raw / "labels", "--output", tmp_path / "x", "--device", "cpu")
    text = run("locate_train.py", *where, "--normalise", "zscore", *flags, fails=True)
    assert words in text and not (tmp_path / "x").exists()


def test_cases_to_learn_from_are_listed(raw, tmp_path):
    files = {name: (tmp_path / name, tmp_path / name) for name in "abcd"} | {"e": (tmp_path / "e", None)}
    config = SimpleNamespace(cases=None, folds=0, trust=())
    splits = {"a": "train", "b": "val", "c": "test", "d": "train"}
    assert list(held_out.choose(config, Cases(files, splits=splits))) == ["a", "b", "d"]
    config.cases = tmp_path / "list.txt"
    config.cases.write_text("a\nd\n")
    assert list(held_out.choose(config, Cases(files))) == ["a", "d"]
    config.cases.write_text("a\ne\n")
    with pytest.raises(UserError, match="names e, which is no labelled case: there are a, b, c, d"):
        held_out.choose(config, Cases(files))


def test_a_locator_is_not_replaced_unasked_and_no_run_is(trained, raw, tmp_path):
    where = ("--images", raw / "images", "--labels", raw / "labels", "--normalise", "zscore")
    assert "holds a locator" in run("locate_train.py", *where, "--output", trained[0], fails=True)
    model = make_run(tmp_path / "run")
    assert "is a run's folder" in run("locate_train.py", *where, "--output", model, "--overwrite", fails=True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--roi", "auto"), "--roi auto needs --locator"),
        (("--locator", "x"), "--locator is for --roi auto"),
        (("--roi", "auto", "--locator", "nowhere"), "--locator nowhere is no locator's folder, it has no locator.json"),
    ],
)
def test_a_locator_is_needed_and_only_there(raw, tmp_path, flags, words):
    model = make_run(tmp_path / "run")
    where = ("--run", model, "--input", raw / "images", "--output", tmp_path / "out")
    assert words in run("predict.py", *where, *flags, fails=True) and not (tmp_path / "out").exists()


def test_an_impossible_roi_is_one_sentence():
    done = run_script("predict.py", "--run", "x", "--input", "y", "--output", "z", "--roi", "autoo")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "Got errors" not in done.stderr
    assert "--roi" in done.stderr and "see --help" in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("facts"),
        lambda content: content["facts"].update(margin_mm=-3),
        lambda content: content["facts"].update(margin_mm=float("nan")),
        lambda content: content["facts"].update(sides_mm=[[1, 2]]),
        lambda content: content["facts"]["preprocessing"].update(spacing_mm=None),
        lambda content: content.update(network="transformer"),
    ],
)
def test_a_damaged_description_is_refused(bright, change):
    content = json.loads((bright / "locator.json").read_text())
    change(content)
    (bright / "locator.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="locator.json cannot be read .*restore it, or train the locator again"):
        Locator.read(bright, torch.device("cpu"))


def test_weights_of_another_locator_are_refused(bright, trained):
    shutil.copy(trained[0] / "weights.pth", bright)
    with pytest.raises(UserError, match="weights.pth is not the file that locator.json was written for"):
        Locator.read(bright, torch.device("cpu"))
    (bright / "weights.pth").unlink()
    with pytest.raises(UserError, match="it has no weights.pth"):
        Locator.read(bright, torch.device("cpu"))
