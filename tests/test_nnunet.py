"""nnU-Net's data sets, both ways: its layout read, its splits and names kept, predictions as its tools read them."""

import json
import re

import nibabel
import numpy as np
import pytest
from test_honest_runs import main
from test_joining import lists, save

from dataloaders.import_nnunet import Config
from dataloaders.import_nnunet import main as import_nnunet
from dataloaders.own import read_data_set
from dataloaders.scans.nnunet import read_description
from sdcl.runs.errors import UserError

SECOND = {
    "channel_names": {"0": "T2"}, "labels": {"background": 0, "wall": 3, "cavity": 1}, "numTraining": 5,
    "file_ending": ".nii.gz",
}  # fmt: skip
FIRST = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver"}, "name": "old"}


def describe(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture
def raw(tmp_path):
    """Five images, four of them labelled with 1 and 3, and a test set of two, one of them labelled."""
    folder = describe(tmp_path / "Dataset123_Heart", SECOND)
    for k in range(5):
        save(folder / "imagesTr" / f"h_{k:03d}_0000.nii.gz", k)
    for k in range(4):
        label = np.zeros((12, 11, 10), np.uint8)
        label[2:6, 2:6, 2:6], label[7:9, 7:9, 5:8] = 1, 3
        path = folder / "labelsTr" / f"h_{k:03d}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(label, np.diag([-1.5, -1.5, 3, 1])), path)
    return folder


def add_tests(raw):
    for k in (7, 8):
        save(raw / "imagesTs" / f"h_{k:03d}_0000.nii.gz", k)
    save(raw / "labelsTs" / "h_007.nii.gz", 1, label=True)


def test_labels_without_images_and_images_without_labels(raw, tmp_path, said):
    said()
    save(tmp_path / "more" / "x_0000.nii.gz", 9)
    import_nnunet(Config(raw, tmp_path / "heart", unlabelled=tmp_path / "more", test_fraction=0.25))
    found = lists(tmp_path / "heart")
    assert found["train_unlab"] == ["h_004", "x"] and len(found["train_lab"]) == 3 and len(found["test"]) == 1
    data_set = read_data_set(tmp_path / "heart")
    assert data_set.class_names == ("cavity", "wall") and data_set.label_values == (1, 3)
    assert data_set.preprocessing.normalise == "zscore" and "channel T2, normalised by zscore" in said()


def test_its_own_test_set_and_folds(raw, tmp_path, said):
    add_tests(raw)
    folds = [{"train": ["h_000", "h_001"], "val": ["h_002", "h_003"]}, {"train": ["h_002", "h_003"], "val": ["h_000"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(folds), encoding="utf-8")
    said()
    import_nnunet(Config(raw, tmp_path / "a"))
    assert lists(tmp_path / "a")["test"] == ["h_007"] and len(lists(tmp_path / "a")["train_lab"]) == 4
    assert "images of imagesTs without a label, left out (predict.py segments them): h_008" in said()
    import_nnunet(Config(raw, tmp_path / "b", splits=tmp_path / "splits_final.json"))
    found = lists(tmp_path / "b")
    assert (found["train_lab"], found["val"], found["test"]) == (["h_000", "h_001"], ["h_002", "h_003"], ["h_007"])
    with pytest.raises(UserError, match="leaves h_001 out of fold 1"):
        import_nnunet(Config(raw, tmp_path / "c", splits=tmp_path / "splits_final.json", fold=1))
    with pytest.raises(UserError, match="--fold is 2, but .* has 2 folds"):
        import_nnunet(Config(raw, tmp_path / "c", splits=tmp_path / "splits_final.json", fold=2))
    folds[0]["val"].append("h_004")
    (tmp_path / "splits_final.json").write_text(json.dumps(folds), encoding="utf-8")
    with pytest.raises(UserError, match="names h_004, which has no image or no label"):
        import_nnunet(Config(raw, tmp_path / "c", splits=tmp_path / "splits_final.json"))


def test_the_first_version_is_read_and_ct_is_clipped(tmp_path):
    found = read_description(describe(tmp_path / "Task01", FIRST))
    assert (found.class_names, found.label_values) == (("liver",), (1,))
    assert (found.normalise, found.ending) == (("ct",), ".nii.gz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_names": {"0": "T1", "2": "T2"}}, "its channels must be numbered 0, 1, ... and have different names"),
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "the label whole is a region"),
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, 'has a label "ignore"'),
        ({"labels": {"a": 1}}, "must be a background of 0"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "different numbers"),
        ({"labels": 3}, "cannot be read"),
    ],
)
def test_what_is_not_taken_is_named(changes, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        read_description(describe(tmp_path / "Dataset001_x", SECOND | changes))


def test_files_that_are_missing_or_named_otherwise(raw, tmp_path):
    with pytest.raises(UserError, match="dataset.json does not exist: give as --dataset"):
        import_nnunet(Config(tmp_path, tmp_path / "x"))
    save(raw / "labelsTr" / "z.nii.gz", label=True)
    with pytest.raises(UserError, match=r"z.nii.gz has no image imagesTr/z_0000.nii.gz"):
        import_nnunet(Config(raw, tmp_path / "x"))
    (raw / "labelsTr" / "z.nii.gz").unlink()
    save(raw / "imagesTr" / "h_000_0001.nii.gz")
    with pytest.raises(UserError, match="h_000_0001.nii.gz has none of the channels' numbers _0000 in its name"):
        import_nnunet(Config(raw, tmp_path / "x"))
    (raw / "imagesTr" / "h_000_0001.nii.gz").unlink()
    save(tmp_path / "more" / "h_000_0000.nii.gz")
    with pytest.raises(UserError, match="the case h_000 is in imagesTr and in --unlabelled"):
        import_nnunet(Config(raw, tmp_path / "x", unlabelled=tmp_path / "more"))


def test_predictions_go_back_under_nnunets_names_and_numbers(raw, tmp_path):
    import_nnunet(Config(raw, tmp_path / "heart", layout="slices", slice_axis="z"))
    where = ["--root_path", tmp_path / "heart", "--models_path", tmp_path, "--patch_size", 32, 32, "--batch_size", 2]
    some = ["--pre_iterations", 1, "--self_iterations", 1, "--device", "cpu", "--labelnum", 2]
    main("own_train.py", *where, *some)
    run = tmp_path / "heart_SDCL_2_labeled"
    given = ["--run", run, "--input", raw / "imagesTr", "--output", tmp_path / "out", "--device", "cpu"]
    main("predict.py", *given, "--nnunet_names", "--no-save_figure")
    written = sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz"))
    assert written == [f"h_{k:03d}.nii.gz" for k in range(5)]
    label, image = (nibabel.load(p) for p in (tmp_path / "out" / "h_000.nii.gz", raw / "imagesTr/h_000_0000.nii.gz"))
    assert set(np.unique(label.get_fdata())) <= {0, 1, 3} and np.allclose(label.affine, image.affine)


def test_nnunets_own_evaluation_gives_our_dice(raw, tmp_path):
    """Its mean Dice of two label maps, and ours of the same."""
    evaluation = pytest.importorskip("nnunetv2.evaluation.evaluate_predictions")
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    from sdcl.metrics import case_metrics

    prediction = np.roll(nibabel.load(raw / "labelsTr" / "h_000.nii.gz").get_fdata().astype(np.uint8), 1, axis=0)
    path = tmp_path / "h_000.nii.gz"
    nibabel.save(nibabel.Nifti1Image(prediction, np.diag([-1.5, -1.5, 3, 1])), path)
    theirs = evaluation.compute_metrics(str(raw / "labelsTr" / "h_000.nii.gz"), str(path), SimpleITKIO(), [1, 3])
    reference = nibabel.load(raw / "labelsTr" / "h_000.nii.gz").get_fdata()
    for value in (1, 3):
        ours = case_metrics(prediction == value, reference == value).dice
        assert theirs["metrics"][value]["Dice"] == pytest.approx(ours)
