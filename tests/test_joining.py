"""Scans and labels as people have them: nested folders by patterns, a table, labels whose headers say nothing."""

import json

import nibabel
import numpy as np
import pytest

from dataloaders.files import read_list, read_sample
from dataloaders.import_nifti import Config
from dataloaders.import_nifti import main as import_nifti
from dataloaders.own import read_data_set
from dataloaders.scans.joining import by_pattern, read_table
from sdcl.runs.errors import UserError


def save(path, seed=0, label=False, affine=None):
    """A small scan, or its label: a box that seed moves."""
    shape, rng = (12, 11, 10), np.random.default_rng(seed)
    array = rng.normal(size=shape).astype(np.float32)
    if label:
        array = np.zeros(shape, np.uint8)
        array[2 + seed % 4 : 7 + seed % 4, 3:8, 2:6] = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-1.5, -1.5, 3, 1]) if affine is None else affine), path)
    return path


@pytest.fixture
def bids(tmp_path):
    """sub-01 to sub-05, each with a T1w and, but for the last, a label in derivatives."""
    root = tmp_path / "bids"
    for k in range(1, 6):
        save(root / f"sub-0{k}" / "anat" / f"sub-0{k}_T1w.nii.gz", k)
        save(root / f"sub-0{k}" / "anat" / f"sub-0{k}_FLAIR.nii.gz", k + 10)
        if k < 5:
            save(root / "derivatives" / "seg" / f"sub-0{k}" / f"sub-0{k}_mask.nii.gz", k, label=True)
    return root


def lists(root):
    return {name: read_list(path) for name in ("train_lab", "train_unlab", "test", "val")
            if (path := root / "data_split" / f"{name}.txt").exists() and path.read_text()}  # fmt: skip


def test_a_bids_folder_by_patterns(bids, tmp_path, said):
    said()
    config = Config(
        tmp_path / "mine", ("zscore",), bids, bids, image_pattern="**/*_T1w.nii.gz", label_pattern="**/*_mask.nii.gz"
    )
    import_nifti(config)
    found = lists(tmp_path / "mine")
    assert sorted(found["train_lab"] + found["test"]) == [f"sub-0{k}" for k in range(1, 5)]
    assert found["train_unlab"] == ["sub-05"] and "5 files of **/*_T1w.nii.gz" in said()


def test_files_of_one_name_in_a_folder_a_patient(tmp_path):
    for k in (1, 2):
        save(tmp_path / "clinic" / f"p{k}" / "day0" / "image.nii.gz", k)
    assert list(by_pattern(tmp_path, "clinic/*/day0/image.nii.gz")) == ["p1", "p2"]
    assert list(by_pattern(tmp_path / "clinic", "*/*/image.nii.gz")) == ["p1_day0", "p2_day0"]
    assert list(by_pattern(tmp_path, "**/image.nii.gz")) == ["clinic_p1_day0", "clinic_p2_day0"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("image.nii.gz", "needs a star"),
        ("../*.nii.gz", "no way out of"),
        ("sub-01/**", "names folders alone"),
        ("**/*_T2w.nii.gz", "holds nothing of the pattern"),
    ],
)
def test_patterns_that_name_no_cases(pattern, message, bids):
    with pytest.raises(UserError, match=message):
        by_pattern(bids, pattern)


def test_what_the_stars_of_a_files_name_stand_for_names_the_case(bids):
    assert list(by_pattern(bids, "*/anat/*.nii.gz"))[:2] == ["sub-01_FLAIR", "sub-01_T1w"]
    assert list(by_pattern(bids, "sub-0?/anat/sub-*_T1w.nii.gz"))[:2] == ["01", "02"]


def test_two_files_that_make_one_case_are_refused(tmp_path):
    for k in (1, 2):
        save(tmp_path / f"s{k}" / "a_T1w.nii.gz", k)
    with pytest.raises(UserError, match="both make the case a: put a star where their paths differ"):
        by_pattern(tmp_path, "*/*_T1w.nii.gz")


def write_table(path, lines, head="case,image,label,patient,split"):
    path.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def clinic(tmp_path):
    """Six cases of three patients, two days each; the last day has no label."""
    lines = []
    for patient in "abc":
        for day in (1, 2):
            image = save(tmp_path / "raw" / patient / f"{day}.nii.gz", day)
            label = save(tmp_path / "raw" / patient / f"{day}_gt.nii.gz", day, label=True)
            has_label = (patient, day) != ("c", 2)
            names = [p.relative_to(tmp_path).as_posix() for p in (image, label)]
            lines.append([f"{patient}{day}", names[0], names[1] if has_label else "", patient])
    return tmp_path, lines


def test_patients_are_never_on_both_sides(clinic, said):
    root, lines = clinic
    table = write_table(root / "cases.csv", [",".join(line) for line in lines], "case,image,label,patient")
    said()
    import_nifti(Config(root / "mine", ("zscore",), table=table, test_fraction=0.34, seed=0))
    found = lists(root / "mine")
    sides = [{name[0] for name in found.get(key, [])} for key in ("test", "train_lab", "train_unlab")]
    assert len(sides[0]) == 1 and len(found["test"]) in (1, 2) and not sides[0] & (sides[1] | sides[2])
    data_set = read_data_set(root / "mine")
    assert data_set.patient_of("a2") == "a" and data_set.patient_of("a1_slice_3") == "a"
    if "c" in sides[0]:
        assert "left out of training, since their patients are held out: c2" in said()
    said()
    for name in ("raw/d/1.nii.gz", "raw/d/1_gt.nii.gz"):
        save(root / name, 1, label="gt" in name)
    held = sorted(sides[0])[0]
    more = [*lines, ["e1", "raw/d/1.nii.gz", "raw/d/1_gt.nii.gz", "e"], [f"{held}9", "raw/d/1.nii.gz", "", held]]
    write_table(table, [",".join(line) for line in more], "case,image,label,patient")
    import_nifti(Config(root / "mine", ("zscore",), table=table, test_fraction=0.34, seed=0))
    assert lists(root / "mine")["test"] == found["test"] and "e1" in lists(root / "mine")["train_lab"]
    assert f"since their patients are held out: {held}9" in said() or held == "c"


def test_a_tables_splits_are_taken_as_they_are(clinic):
    root, lines = clinic
    side = {"a": "train", "b": "test", "c": "val"}
    rows = [",".join([*line, side[line[3]] if line[2] else ""]) for line in lines]
    table = write_table(root / "cases.csv", rows)
    with pytest.raises(
        UserError, match="has the patient c in val .c1. and in train .c2.: a patient must be on one side"
    ):
        import_nifti(Config(root / "mine", ("zscore",), table=table))
    import_nifti(Config(root / "mine", ("zscore",), table=write_table(root / "cases.csv", rows[:-1])))
    assert lists(root / "mine") == {"train_lab": ["a1", "a2"], "test": ["b1", "b2"], "val": ["c1"]}


@pytest.mark.parametrize(
    ("head", "lines", "message"),
    [
        ("name,image", ["x,a.nii.gz"], "has the columns name, image: it needs case and image"),
        ("case,image", [], "has no lines"),
        ("case,image", ["x,a.nii.gz", "x,a.nii.gz"], "line 3: the case x is there already"),
        ("case,image", [",a.nii.gz"], "line 2: the case has no name"),
        ("case,image", ["x,b.nii.gz"], "line 2: the file b.nii.gz does not exist, seen from"),
        ("case,image,split", ["x,a.nii.gz,tset"], "the split tset is none of train, val, test"),
        ("case,image,split", ["x,a.nii.gz,test"], "a case of test needs a label"),
        ("case,image,patient", ["x,a.nii.gz,p", "y,a.nii.gz,"], "gives some cases a patient, but y has none"),
        ("case,image,label,split", ["x,a.nii.gz,a.nii.gz,train", "y,a.nii.gz,a.nii.gz,"], "a split, but y has none"),
    ],
)
def test_tables_that_cannot_be_read(head, lines, message, tmp_path):
    save(tmp_path / "a.nii.gz")
    with pytest.raises(UserError, match=message):
        read_table(write_table(tmp_path / "cases.csv", lines, head))


def test_too_much_and_too_little_is_refused(tmp_path):
    output = tmp_path / "mine"
    for given, message in (
        ({"table": tmp_path, "images": tmp_path}, "--table names every file itself"),
        ({"images": tmp_path}, "--images and --labels are needed"),
        ({"images": tmp_path, "labels": tmp_path, "image_pattern": "*"}, "belong together: give both"),
        ({"images": tmp_path, "labels": tmp_path}, "give the folder of each, or patterns"),
        ({"table": tmp_path / "none.csv"}, "--table .* cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            import_nifti(Config(output, ("zscore",), **given))


def test_labels_without_geometry_lie_on_their_scans_voxel_by_voxel(tmp_path, said):
    for k in range(4):
        save(tmp_path / "images" / f"c{k}.nii.gz", k)
        save(tmp_path / "labels" / f"c{k}.nii.gz", k, label=True, affine=np.eye(4) if k else None)
    config = Config(tmp_path / "mine", ("zscore",), tmp_path / "images", tmp_path / "labels")
    with pytest.raises(UserError, match="mm beside"):
        import_nifti(config)
    said()
    import_nifti(Config(tmp_path / "mine", ("zscore",), tmp_path / "images", tmp_path / "labels", by_index=True))
    told = said()
    assert "NOTE: --by_index: the labels of 3 cases have no geometry" in told
    assert (tmp_path / "mine" / "by_index.png").read_bytes().startswith(b"\x89PNG")
    for k in (0, 3):  # one by its header, one by index: each has its own box
        label = read_sample(tmp_path / "mine" / "data" / f"c{k}.h5", ndim=3, num_classes=2).label
        raw = nibabel.load(tmp_path / "labels" / f"c{k}.nii.gz").get_fdata()
        assert label.sum() == raw.sum() and np.array_equal(np.unique(np.nonzero(label)[2]), [2, 3, 4, 5])
    content = json.loads((tmp_path / "mine" / "dataset.json").read_text())
    assert "patients" not in content
