"""A run is not a dead end: lengthened, scored elsewhere, on held-out cases, its teacher too, from any checkpoint."""

import csv
import json
import re

import nibabel
import numpy as np
import pytest
import torch
from helpers import method
from test_honest_runs import VOLUMES, main

from dataloaders.import_nifti import Config as Import
from dataloaders.import_nifti import main as import_nifti
from sdcl import checkpoints
from sdcl.checkpoints import load_weights
from sdcl.networks import build_network
from sdcl.runs.errors import UserError
from sdcl.runs.folder import Reads, differing_fields, lengthened, open_run
from sdcl.runs.weights import check_prepared

SLICES = ["--labelnum", 2, "--patch_size", 32, 32, "--batch_size", 2, "--pre_iterations", 2, "--pre_val_every", 0,
          "--self_val_every", 2, "--select", "last", "--device", "cpu", "--log_every", 1]  # fmt: skip


@pytest.fixture(scope="module")
def runs(acdc_phantom, scratch):
    """Two ACDC runs of one stage 1: one of 4 iterations of self-training, one of 2."""
    where = ["--root_path", acdc_phantom, "--models_path", scratch, *SLICES]
    main("ACDC_train.py", *where, "--exp", "long", "--self_iterations", 4)
    first = ["--pretrained", scratch / "acdc_long_2_labeled"]
    main("ACDC_train.py", *where, "--exp", "short", "--self_iterations", 2, *first)
    return scratch, [*where, *first]


def weights(folder):
    networks = checkpoints.load(folder / "self_train" / "last.pth")["networks"]
    return {f"{role} {name}": value for role, state in networks.items() for name, value in state.items()}


def test_a_lengthened_run_is_the_longer_one_to_the_bit(runs):
    models, where = runs
    said = main("ACDC_train.py", *where, "--exp", "short", "--self_iterations", 4)
    assert "self-training was planned with 2 iterations and goes on to 4" in said and "iterations 3 to 4" in said
    ours, theirs = (weights(models / f"acdc_{name}_2_labeled") for name in ("short", "long"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    content = json.loads((models / "acdc_short_2_labeled" / "config.json").read_text())
    assert content["config"]["self_iterations"] == 4 and content["lengthened"] == [{"from": 2, "to": 4}]
    rows = [
        (models / f"acdc_{name}_2_labeled" / "self_train" / "metrics.csv").read_text() for name in ("short", "long")
    ]
    assert rows[0] == rows[1]
    with pytest.raises(UserError, match="another configuration .self_iterations 4 there, 3 now"):
        main("ACDC_train.py", *where, "--exp", "short", "--self_iterations", 3)


def test_a_ramp_keeps_its_length_when_a_run_grows():
    """Two fifths of 10 iterations are 4: of 20 they would be 8, which is another run."""
    there = vars(method(method="ua_mt", self_iterations=10))
    assert not lengthened(there, there) and lengthened(there, there | {"self_iterations": 20})
    assert differing_fields(there, there | {"self_iterations": 20, "rampup": 8}) == "rampup 4 there, 8 now"
    assert differing_fields(there, there | {"self_iterations": 20, "rampup": 4}) == ""
    assert "self_iterations 10 there, 5 now" in differing_fields(there, there | {"self_iterations": 5})
    assert "kl_weight" in differing_fields(there, there | {"self_iterations": 20, "kl_weight": 1.0})


def test_a_run_of_an_earlier_version_is_lengthened_and_resumed(tmp_path):
    """Its config.json does not say the ramp's length: the first longer start writes it down."""
    config = vars(method(method="ua_mt", self_iterations=10, rampup=None)) | {"patch_size": [32, 32], "labelnum": 2}
    config |= {"student_a": "unet", "student_b": "resunet", "select": "last"}
    reads, cpu = Reads({}, {}, (), None), torch.device("cpu")
    open_run(tmp_path, config, reads, cpu)
    longer = config | {"self_iterations": 20, "rampup": 4}
    for _ in range(2):
        open_run(tmp_path, longer, reads, cpu)
    kept = json.loads((tmp_path / "config.json").read_text())["config"]
    assert (kept["self_iterations"], kept["rampup"]) == (20, 4)
    assert differing_fields(config, longer) == ""  # of a checkpoint that the earlier version saved
    with pytest.raises(UserError, match="rampup 4 there, 8 now"):
        open_run(tmp_path, longer | {"rampup": 8}, reads, cpu)


def test_structures_of_another_data_set_are_paired_by_order_or_refused(tmp_path, said):
    said()
    task = {"name": "acdc", "class_names": ["RV", "Myo", "LV"], "label_values": [1, 2, 3], "preprocessing": None}
    config = {"patch_size": [32, 32], "labelnum": 2, "student_a": "unet", "student_b": "resunet", "select": "last"}
    (tmp_path / "config.json").write_text(json.dumps({"config": config, "task": task, "resumed": []}))
    other = task | {"name": "clinic", "class_names": ["LV", "Myo", "RV"]}
    with pytest.raises(
        UserError, match="was trained on the structures RV, Myo, LV, and --root_path calls them LV, Myo"
    ):
        check_prepared(tmp_path, other, True)
    check_prepared(tmp_path, task | {"name": "clinic", "class_names": ["right", "Myo", "left"]}, True)
    assert "paired by their order: RV counts as right, LV counts as left" in said()
    with pytest.raises(UserError, match="class_names"):
        check_prepared(tmp_path, other | {"name": "acdc"}, True)  # its own data set, named otherwise


def cases(folder):
    with open(folder / "cases.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_teacher_is_scored_where_it_is_asked_for(runs, acdc_phantom):
    models, _ = runs
    where = ["--root_path", acdc_phantom, "--run", models / "acdc_long_2_labeled", "--split", "val", "--device", "cpu"]
    said = main("test_ACDC.py", *where, "--predictors", "teacher", "mean")
    folder = models / "acdc_long_2_labeled" / "test" / "self_train_val_teacher-mean"
    found = {row["predictor"] for row in cases(folder)}
    assert {name.split(",")[0] for name in found} == {"teacher", "mean"} and "teacher, last (4)" in found
    assert "scoring" in said and (folder / "report.html").exists()
    with pytest.raises(
        UserError, match="--predictors techer is none of sdcl's: choose of teacher, student_a, student_b"
    ):
        main("test_ACDC.py", *where, "--predictors", "techer")
    with pytest.raises(UserError, match="--predictors teacher is none of pre_train's"):
        main("test_ACDC.py", *where, "--stage", "pre_train", "--predictors", "teacher")


def test_a_run_is_scored_by_its_folder(runs, acdc_phantom, tmp_path):
    models, _ = runs
    where = ["--root_path", acdc_phantom, "--split", "val", "--device", "cpu"]
    with pytest.raises(UserError, match=re.escape(f"--run {tmp_path} is no run's folder")):
        main("test_ACDC.py", *where, "--run", tmp_path)
    both = ["--student_a_weights", tmp_path, "--student_b_weights", tmp_path]
    with pytest.raises(UserError, match="--run and --student_a_weights both say what to score"):
        main("test_ACDC.py", *where, "--run", models / "acdc_long_2_labeled", *both)


def own_from(la, output):
    """An LA phantom's test cases as a data set of one's own: normalised alike, another name."""
    import h5py

    images, labels = output / "raw" / "images", output / "raw" / "labels"
    for folder in (images, labels):
        folder.mkdir(parents=True)
    for name in (la / "data_split" / "train.txt").read_text().split():
        path = next((la / "data").rglob(f"{name}*/*.h5"))
        with h5py.File(path) as file:
            for folder, key in ((images, "image"), (labels, "label")):
                array = file[key][:].astype(np.float32 if key == "image" else np.uint8)
                nibabel.save(nibabel.Nifti1Image(array, np.diag([-1, -1, 1, 1])), folder / f"{name}.nii.gz")
    import_nifti(Import(output / "clinic", ("zscore",), images, labels))
    return output / "clinic"


@pytest.mark.slow
def test_a_run_is_scored_on_another_compatible_data_set_and_its_held_out_cases(la_phantom, scratch, tmp_path):
    where = ["--root_path", la_phantom, "--models_path", scratch, *VOLUMES, "--exp", "held"]
    main("LA_train.py", *where, "--pre_iterations", 2, "--self_iterations", 1, "--select", "val", "--val_cases", 1)
    run = scratch / "la_held_2_labeled"
    some = ["--stride", 32, 16, 16, "--device", "cpu", "--run", run]
    said = main("test_LA.py", "--root_path", la_phantom, "--split", "val", *some)
    names = (la_phantom / "data_split" / "train.txt").read_text().split()
    assert {row["case"] for row in cases(run / "test" / "self_train_val")} == {names[-1]}
    assert "'best on val' was selected on these very volumes" in said and "TRAINED" not in said
    own = own_from(la_phantom, tmp_path)
    said = main("test_own.py", "--root_path", own, *some)
    assert "very volumes" not in said and "TRAINED" not in said  # the names are the training cases', the data are not
    assert (run / "test" / "self_train_on_clinic_test" / "report.html").exists()


def test_no_held_out_cases_are_refused(runs, la_phantom, scratch):
    where = ["--root_path", la_phantom, "--models_path", scratch, *VOLUMES, "--exp", "none"]
    main("LA_train.py", *where, "--pre_iterations", 1, "--self_iterations", 0, "--select", "last")
    some = ["--stride", 32, 16, 16, "--stage", "pre_train", "--run", scratch / "la_none_2_labeled", "--device", "cpu"]
    with pytest.raises(UserError, match="has no val.txt, and the run held out no training cases"):
        main("test_LA.py", "--root_path", la_phantom, "--split", "val", *some)


@pytest.mark.parametrize("container", ["net", "state_dict", "model_state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_of_other_trainers_load(container, prefix, tmp_path):
    source, network = build_network("unet", 3), build_network("unet", 3)
    state = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save({container: state, "epoch": 3} if container else state, tmp_path / "a.pth")
    load_weights(network, tmp_path / "a.pth")
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in network.state_dict().items())


def test_any_checkpoint_predicts(runs, tmp_path):
    """A stage's last student, by its file: as --predictor of that run says, and other files are refused by name."""
    models, _ = runs
    run = models / "acdc_long_2_labeled"
    scan = nibabel.Nifti1Image(np.random.default_rng(0).random((32, 32, 3), np.float32), np.diag([1, 1, 8, 1]))
    nibabel.save(scan, tmp_path / "scan.nii.gz")
    given = ["--run", run, "--input", tmp_path / "scan.nii.gz", "--device", "cpu", "--no-save_figure"]
    found = []
    for k, more in enumerate((["--predictor", "student_a"], ["--predictor", "student_a", "--checkpoint",
                              run / "self_train" / "last.pth"], ["--predictor", "teacher"])):  # fmt: skip
        main("predict.py", *given, "--output", tmp_path / str(k), "--save_probability", *more)
        found.append(nibabel.load(tmp_path / str(k) / "scan_probability.nii.gz").get_fdata())
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])
    with pytest.raises(UserError, match="does not exist"):
        main("predict.py", *given, "--output", tmp_path / "x", "--checkpoint", tmp_path / "none.pth")
