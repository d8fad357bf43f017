"""Only files that this project wrote are replaced: the record, and every script that writes, place by place."""

import json
import os
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from test_predict import make_run
from test_raw import run
from test_scans import picture, write_nifti

from dataloaders.phantom import write_nifti as write_own
from dataloaders.phantom import write_pictures
from dataloaders.scans.results import read_volumes
from sdcl.runs.atomic import replacing, write_text
from sdcl.runs.errors import UserError
from sdcl.runs.written_files import RECORD, TEMPORARY, check_replaceable, remove_written_folder
from sdcl.scoring import report

PRECIOUS = b"hours of somebody's work"
NOT_OUTPUT = (RECORD, ".lock", ".volumes.csv.lock")


def test_our_own_file_is_replaced_and_a_foreign_one_is_not(tmp_path):
    write_text(tmp_path / "ours.txt", "1")
    write_text(tmp_path / "ours.txt", "2")
    (tmp_path / "theirs.txt").write_bytes(PRECIOUS)
    with pytest.raises(UserError, match="theirs.txt exists, and no record says that this project wrote it"):
        write_text(tmp_path / "theirs.txt", "3")
    assert (tmp_path / "ours.txt").read_text() == "2" and (tmp_path / "theirs.txt").read_bytes() == PRECIOUS
    assert not list(tmp_path.glob(f"{TEMPORARY}*"))


def test_a_file_that_somebody_has_changed_is_not_replaced(tmp_path):
    write_text(tmp_path / "a.txt", "1")
    (tmp_path / "a.txt").write_text("corrected by hand")
    with pytest.raises(UserError, match="a.txt has been changed since this project wrote it"):
        write_text(tmp_path / "a.txt", "2")
    assert (tmp_path / "a.txt").read_text() == "corrected by hand"


def test_a_log_that_grew_is_replaced(tmp_path):
    write_text(tmp_path / "log.txt", "1", any_content=True)
    with open(tmp_path / "log.txt", "a") as file:
        file.write("more")
    write_text(tmp_path / "log.txt", "2", any_content=True)
    assert (tmp_path / "log.txt").read_text() == "2"


def test_a_copied_folder_is_still_ours(tmp_path):
    write_text(tmp_path / "one" / "a.txt", "1")
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)  # other times of change
    check_replaceable(tmp_path / "two" / "a.txt")


@pytest.mark.skipif(os.name != "posix", reason="links")
@pytest.mark.parametrize("target", ["there.txt", "nowhere.txt"])
def test_a_link_of_the_users_is_not_replaced(tmp_path, target):
    (tmp_path / "there.txt").write_bytes(PRECIOUS)
    (tmp_path / "a.txt").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match="no record says that this project wrote it"):
        write_text(tmp_path / "a.txt", "1")
    assert (tmp_path / "a.txt").is_symlink() and (tmp_path / "there.txt").read_bytes() == PRECIOUS


def test_a_torn_line_of_the_record_loses_no_other(tmp_path):
    write_text(tmp_path / "a.txt", "1")
    with open(tmp_path / RECORD, "a") as file:
        file.write('["b.txt", "12')  # a kill
    write_text(tmp_path / "c.txt", "1")
    write_text(tmp_path / "a.txt", "2")
    write_text(tmp_path / "c.txt", "2")


def test_a_kill_between_record_and_file_leaves_the_old_file_ours(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "1")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("2")
    monkeypatch.undo()
    write_text(tmp_path / "a.txt", "3")
    assert (tmp_path / "a.txt").read_text() == "3"


def test_a_folder_is_removed_with_our_files_only(tmp_path):
    write_text(tmp_path / "run" / "stage" / "a.txt", "1")
    (tmp_path / "run" / "notes.txt").write_bytes(PRECIOUS)
    with pytest.raises(UserError, match="notes.txt"):
        remove_written_folder(tmp_path / "run")
    assert (tmp_path / "run" / "stage" / "a.txt").exists()
    (tmp_path / "run" / "notes.txt").unlink()
    remove_written_folder(tmp_path / "run")
    assert not (tmp_path / "run").exists()


ADD_ONE_SCAN = """
import sys
from pathlib import Path
from dataloaders.scans.results import add_volumes
row = {"structure": "a", "volume_ml": 1.0, "voxels": 2, "weights": "w"}
for k in range(20):
    add_volumes(Path(sys.argv[1]), [row | {"scan": f"{sys.argv[2]}_{k}"}])
"""


def test_predictions_side_by_side_share_one_table(tmp_path):
    command = [sys.executable, "-c", ADD_ONE_SCAN, str(tmp_path / "volumes.csv")]
    writers = [subprocess.Popen([*command, name]) for name in ("a", "b", "c")]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    names = {row["scan"] for row in read_volumes(tmp_path / "volumes.csv")}
    assert names == {f"{name}_{k}" for name in ("a", "b", "c") for k in range(20)}


@pytest.fixture(scope="module")
def material(scratch, acdc_phantom):
    """What the scripts read: raw scans, pictures, an nnU-Net data set, untrained and trained runs."""
    write_own(scratch / "raw", cases=4, labelled_cases=3, size=(24, 20, 16))
    write_pictures(scratch / "pictures", cases=3, labelled_cases=3, side=32)
    nnunet = scratch / "Dataset001_Mine"
    for k in range(3):
        source = scratch / "raw"
        for kind, name in (("images", f"case_{k + 1:02d}_0000"), ("labels", f"case_{k + 1:02d}")):
            target = nnunet / f"{kind}Tr" / f"{name}.nii.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / kind / f"case_{k + 1:02d}.nii.gz", target)
    description = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "atrium": 1}, "file_ending": ".nii.gz"}
    (nnunet / "dataset.json").write_text(json.dumps(description))
    for k, (frame, shape) in enumerate((("01", (24, 20, 3)), ("12", (24, 20, 3)))):
        for suffix, array in (("", picture(shape, k)), ("_gt", (picture(shape, k) > 500).astype(np.uint8))):
            write_nifti(scratch / "acdc_raw" / "patient001" / f"patient001_frame{frame}{suffix}", array)
    make_run(scratch / "run")
    write_nifti(scratch / "scan", picture())
    tiny = ["--patch_size", 32, 32, "--batch_size", 2, "--labelnum", 2, "--pre_iterations", 1, "--self_iterations", 1]
    train = ["--root_path", acdc_phantom, *tiny, "--device", "cpu"]
    run("ACDC_train.py", *train, "--models_path", scratch / "models")
    return scratch, {"train": train, "acdc": acdc_phantom}


IMPORT = ("--normalise", "zscore", "--workers", 1)
SCRIPTS = {
    "phantom.py": lambda f, out: ("../dataloaders/phantom.py", "--dataset", "nifti", "--root_path", out),
    "import_nifti.py, volumes": lambda f, out: (
        "../dataloaders/import_nifti.py", "--images", f[0] / "raw" / "images", "--labels", f[0] / "raw" / "labels",
        "--output", out / "own", *IMPORT,
    ),
    "import_nifti.py, slices": lambda f, out: (
        "../dataloaders/import_nifti.py", "--images", f[0] / "pictures" / "images",
        "--labels", f[0] / "pictures" / "labels", "--output", out / "own", "--layout", "slices", *IMPORT,
    ),
    "import_nnunet.py": lambda f, out: (
        "../dataloaders/import_nnunet.py", "--dataset", f[0] / "Dataset001_Mine", "--output", out / "own",
        "--workers", 1,
    ),
    "preprocess_acdc.py": lambda f, out: (
        "../dataloaders/preprocess_acdc.py", "--raw", f[0] / "acdc_raw", "--root_path", out, "--overwrite",
    ),
    "predict.py": lambda f, out: (
        "predict.py", "--run", f[0] / "run", "--input", f[0] / "scan.nii.gz", "--output", out, "--save_probability",
        "--device", "cpu",
    ),
    "predict.py, nnU-Net's names": lambda f, out: (
        "predict.py", "--run", f[0] / "run", "--input", f[0] / "scan.nii.gz", "--output", out, "--nnunet_names",
        "--device", "cpu",
    ),
    "export.py": lambda f, out: (
        "export.py", "--run", f[0] / "run", "--output", out / "a.pt", "--format", "torchscript",
    ),
    "check.py": lambda f, out: (
        "../dataloaders/check.py", "--dataset", "acdc", "--root_path", f[1]["acdc"], "--figure", out / "check.png",
    ),
    "ACDC_train.py": lambda f, out: ("ACDC_train.py", *f[1]["train"], "--models_path", out),
}  # fmt: skip


def outputs(folder):
    files = {path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_OUTPUT}
    return {path.relative_to(folder) for path in files if "tfevents" not in path.name}  # never of an earlier name


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_writes_over_a_foreign_file(material, tmp_path, name):
    command = SCRIPTS[name]
    clean = tmp_path / "clean"
    script, *arguments = command(material, clean)
    run(script, *arguments)
    places = sorted(outputs(clean))
    assert places
    run(script, *command(material, clean)[1:])  # its own files are no obstacle
    for number, place in enumerate(places):
        folder = tmp_path / f"foreign_{number}"
        script, *arguments = command(material, folder)
        foreign = folder / place
        foreign.parent.mkdir(parents=True, exist_ok=True)
        foreign.write_bytes(PRECIOUS)
        said = run(script, *arguments, fails=True)
        assert foreign.read_bytes() == PRECIOUS, place
        assert foreign.name in said or folder.name in said, (place, said)
        shutil.rmtree(folder)


def test_a_test_checks_every_place_before_it_scores(material, tmp_path, monkeypatch):
    shutil.copytree(material[0] / "models", tmp_path / "models")
    folder, checked = tmp_path / "models" / "acdc_SDCL_2_labeled" / "test", []
    monkeypatch.setattr(report, "check_replaceable", lambda *paths: checked.extend(paths) or check_replaceable(*paths))
    where = ("--root_path", material[1]["acdc"], "--models_path", tmp_path / "models", "--labelnum", 2)
    arguments = (*where, "--device", "cpu", "--save_nifti")
    run("test_ACDC.py", *arguments)
    places = outputs(folder)
    assert places and places <= {path.relative_to(folder) for path in checked}
    for place in places:
        (folder / place).write_bytes(PRECIOUS)
    said = run("test_ACDC.py", *arguments, fails=True)
    assert "has been changed since this project wrote it" in said
    assert all((folder / place).read_bytes() == PRECIOUS for place in places)


@pytest.mark.parametrize("flags", [(), ("--nnunet_names",)])
@pytest.mark.parametrize("kind", ["scan", "label"])
def test_a_prediction_beside_its_scan_changes_no_file(material, tmp_path, flags, kind):
    scan, label = tmp_path / "case_00_0000.nii.gz", tmp_path / "case_00.nii.gz"
    shutil.copyfile(material[0] / "scan.nii.gz", scan)
    nibabel.save(nibabel.Nifti1Image((picture() > 500).astype(np.uint8), np.eye(4)), label)
    kept = {path: path.read_bytes() for path in (scan, label)}
    given = ("--run", material[0] / "run", "--input", scan if kind == "scan" else label, "--output", tmp_path)
    said = run("predict.py", *given, "--device", "cpu", *flags, fails=bool(flags))
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert ("no record says that this project wrote it" in said) == bool(flags)


def test_two_scans_of_one_output_name_are_refused_at_once(material, tmp_path):
    for name in ("case_00", "case_00_0000"):
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copyfile(material[0] / "scan.nii.gz", tmp_path / "in" / f"{name}.nii.gz")
    given = ("--run", material[0] / "run", "--input", tmp_path / "in", "--output", tmp_path / "out", "--nnunet_names")
    said = run("predict.py", *given, "--device", "cpu", fails=True)
    assert "case_00 and case_00_0000 would both be written to" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["import_nifti.py", "import_nnunet.py"])
def test_another_programs_description_stays(material, tmp_path, script):
    own = shutil.copytree(material[0] / "Dataset001_Mine", tmp_path / "Dataset001_Mine")
    content = (own / "dataset.json").read_bytes()
    given = {
        "import_nifti.py": ("--images", own / "imagesTr", "--labels", own / "labelsTr", "--normalise", "zscore"),
        "import_nnunet.py": ("--dataset", own),
    }[script]
    for flags in ((), ("--overwrite",)):
        said = run(f"../dataloaders/{script}", *given, "--output", own, *flags, fails=True)
        assert "holds a dataset.json that no import here wrote" in said
    assert (own / "dataset.json").read_bytes() == content and not (own / "data").exists()


@pytest.mark.parametrize("kept", [(), ("data",)])
def test_cases_of_an_earlier_version_are_converted_again(material, tmp_path, kept):
    nifti = material[0] / "acdc_raw"
    shutil.copytree(nifti, tmp_path / "raw")
    shutil.copytree(nifti / "patient001", tmp_path / "raw" / "patient002")
    for path in sorted((tmp_path / "raw" / "patient002").iterdir()):
        path.rename(path.with_name(path.name.replace("patient001", "patient002")))
    command = ("../dataloaders/preprocess_acdc.py", "--raw", tmp_path / "raw", "--root_path", tmp_path / "acdc")
    run(*command)
    for path in (tmp_path / "acdc").rglob(RECORD):
        if path.parent.name not in kept:
            path.unlink()
    assert "4 cases converted" in run(*command, "--overwrite")
    foreign = tmp_path / "acdc" / "data" / "patient002_frame01.h5"
    foreign.write_bytes(PRECIOUS)
    (tmp_path / "acdc" / "data" / RECORD).unlink()
    assert "no record says" in run(*command, "--overwrite", fails=True) and foreign.read_bytes() == PRECIOUS


def test_a_run_of_an_earlier_version_goes_on_and_is_then_recorded(material, tmp_path):
    folder = shutil.copytree(material[0] / "models", tmp_path / "models") / "acdc_SDCL_2_labeled"
    for path in folder.rglob(RECORD):
        path.unlink()
    (folder / "notes").mkdir()
    (folder / "notes" / "case.png").write_bytes(PRECIOUS)
    (folder / "self_train" / f"{TEMPORARY}last.pth").write_bytes(b"what a kill has left")
    run("ACDC_train.py", *material[1]["train"], "--models_path", tmp_path / "models")
    assert (folder / RECORD).exists() and (folder / "self_train" / RECORD).exists()
    with pytest.raises(UserError, match="no record says that this project wrote it"):
        check_replaceable(folder / "notes" / "case.png")


def test_a_whole_run_can_be_removed_again(material, tmp_path):
    shutil.copytree(material[0] / "models", tmp_path / "models")
    remove_written_folder(tmp_path / "models" / "acdc_SDCL_2_labeled")  # as the demo does with its last runs
    assert not list((tmp_path / "models").iterdir())


def test_an_export_takes_no_checkpoints_place(material):
    run_folder = material[0] / "models" / "acdc_SDCL_2_labeled"
    last = run_folder / "self_train" / "last.pth"
    before = last.read_bytes()
    said = run("export.py", "--run", run_folder, "--output", last, "--format", "torchscript", fails=True)
    assert "is a file of a run, no export" in said and last.read_bytes() == before


@pytest.mark.parametrize("name", ["locator.json", "weights.pth", "held_out.csv"])
def test_a_locator_takes_no_foreign_files_place(material, tmp_path, name):
    (tmp_path / name).write_bytes(PRECIOUS)
    raw = material[0] / "raw"
    given = ("--images", raw / "images", "--labels", raw / "labels", "--normalise", "zscore", "--overwrite")
    said = run("locate_train.py", *given, "--output", tmp_path, fails=True)
    assert f"{name} exists, and no record says" in said and (tmp_path / name).read_bytes() == PRECIOUS


def test_conversions_of_la_and_pancreas_take_no_foreign_files_place(tmp_path):
    image = np.random.default_rng(0).normal(40, 30, (120, 120, 8)).astype(np.int16)
    label = np.zeros(image.shape, np.uint8)
    label[40:60, 50:70, 2:6] = 1
    for file, array in (("lgemri", image), ("laendo", 255 * label)):
        (tmp_path / "la_raw" / "CASE1").mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(sitk.GetImageFromArray(array.T), str(tmp_path / "la_raw" / "CASE1" / f"{file}.nrrd"))
    target = tmp_path / "la" / "data" / "2018LA_Seg_Training Set" / "CASE1" / "mri_norm2.h5"
    target.parent.mkdir(parents=True)
    target.write_bytes(PRECIOUS)
    said = run(
        "../dataloaders/preprocess_la.py", "--raw", tmp_path / "la_raw", "--root_path", tmp_path / "la", fails=True
    )
    assert "mri_norm2.h5 exists, and no record says" in said and target.read_bytes() == PRECIOUS
    write_nifti(tmp_path / "images" / "PANCREAS_0001", image)
    write_nifti(tmp_path / "labels" / "label0001", label)
    where = ("--images", tmp_path / "images", "--labels", tmp_path / "labels", "--root_path", tmp_path / "pancreas")
    for name in ("cases.csv", "data0001.h5"):
        target = tmp_path / "pancreas" / "data" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(PRECIOUS)
        said = run("../dataloaders/preprocess_pancreas.py", *where, "--overwrite", fails=True)
        assert f"{name} exists, and no record says" in said and target.read_bytes() == PRECIOUS
        target.unlink()
