"""The scripts as users run them, on a tiny phantom, and what they say to each mistake."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, write_h5

from sdcl import checkpoints
from sdcl.networks import build_network
from sdcl.runs.config import parse, run_script
from sdcl.runs.errors import UserError

TINY = ["--patch_size", "32", "32", "--batch_size", "2", "--labelnum", "2", "--device", "cpu"]
SHORT = ["--pre_iterations", "3", "--self_iterations", "3", "--pre_val_from", "2", "--pre_val_every", "2"]


def run(script, *arguments, cwd=None):
    command = [sys.executable, str(ROOT / "code" / script), *map(str, arguments)]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}  # what Windows would pipe otherwise
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=300, encoding="utf-8", env=environment
    )


def load(script):
    """Import a script as a module, to call its main in this process."""
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), ROOT / "code" / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(acdc_phantom, scratch):
    """Train from another folder than the repository's."""
    models = scratch / "models"
    done = run("ACDC_train.py", "--root_path", acdc_phantom, "--models_path", models, *TINY, *SHORT, cwd=scratch)
    assert done.returncode == 0, done.stderr
    return models / "acdc_SDCL_2_labeled", done.stdout


def test_training_leaves_what_the_readme_says(trained):
    folder, output = trained
    assert "8 labelled slices" in output and "kept in memory" in output and "an iteration (median" in output
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["patch_size"] == [32, 32] and config["environment"]["packages"]["torch"]
    for stage in ("pre_train", "self_train"):
        names = {path.name.split(".vm")[0].split(".17")[0].split(".18")[0] for path in (folder / stage).iterdir()}
        expected = {"last.pth", "best_student_a.pth", "best_student_b.pth", "best_mean.pth", "metrics.csv", "log.txt"}
        assert expected <= names and any(name.startswith("events.out.tfevents") for name in names)
        assert "Dice on validation cases" in (folder / stage / "log.txt").read_text()
        assert len((folder / stage / "metrics.csv").read_text().splitlines()) == 4


def test_testing_prints_and_writes_tables(trained, acdc_phantom):
    folder, _ = trained
    done = run(
        "test_ACDC.py", "--root_path", acdc_phantom, "--models_path", folder.parent, "--labelnum", 2, "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "student_a, best on val",
        "last (3)",
        "RV",
        "Myo",
        "LV",
        "95HD",
        "±",
        "over 2 cases",
        "cases.png",
    ):
        assert words in done.stdout, words
    written = folder / "test" / "self_train_test"
    summary = json.loads((written / "summary.json").read_text())
    assert {row["structure"] for row in summary["summary"]} == {"RV", "Myo", "LV", "mean"}
    predictors = {row["predictor"] for row in summary["summary"]}
    assert len(predictors) == 6 - sum(" and last (" in name for name in predictors)  # once, where best and last are one
    assert len((written / "cases.csv").read_text().splitlines()) == 1 + len(predictors) * 2 * 3
    assert not (written / "scored").exists()


def test_going_on_with_another_configuration_is_refused(trained, acdc_phantom):
    folder, _ = trained
    done = run(
        "ACDC_train.py", "--root_path", acdc_phantom, "--models_path", folder.parent, *TINY, *SHORT, "--base_lr", "0.1"
    )
    assert done.returncode == 1
    assert "another configuration (base_lr 0.001 there, 0.1 now)" in done.stderr
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr


def test_published_weights_can_be_tested(trained, acdc_phantom, tmp_path):
    for name, role in (("unet", "a"), ("resunet", "b")):
        state = build_network(name, 4).state_dict()
        state["projection_head.0.weight"] = torch.zeros(32, 16)
        torch.save({"net": {f"module.{k}": v for k, v in state.items()}}, tmp_path / f"{role}.pth")
    script = load("test_ACDC.py")
    arguments = ["--root_path", str(acdc_phantom), "--models_path", str(tmp_path), "--patch_size", "32", "32"]
    weights = ["--student_a_weights", str(tmp_path / "a.pth"), "--student_b_weights", str(tmp_path / "b.pth")]
    script.main(parse(script.Config, [*arguments, *weights, "--split", "val"]))
    (results,) = (tmp_path / "test").glob("weights_a_b_*_val")
    assert (results / "cases.csv").exists()
    with pytest.raises(UserError, match="belong together"):
        script.main(parse(script.Config, [*arguments, *weights[:2]]))


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@pytest.mark.parametrize("script", ["code/LA_train.py", "dataloaders/import_nifti.py"])
def test_a_reader_that_leaves_is_no_error(script):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / script), "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert done.stderr == b"" and done.returncode == 141


def test_help_reads_like_documentation():
    done = run("ACDC_train.py", "--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.replace("│", " ").split())  # as it reads, without the box and its line breaks
    for words in ("lambda_mse", "--labelnum", "--u_weight", "multiples of 16", "The defaults are the published run"):
        assert words in text, words


def test_the_defaults_are_the_published_run():
    config = parse(load("ACDC_train.py").Config, [])
    assert (config.pre_iterations, config.self_iterations, config.patch_size) == (11_300, 45_200, (256, 256))
    assert (config.labelnum, config.batch_size, config.base_lr, config.ema_decay) == (7, 12, 1e-3, 0.99)
    assert (config.mse_weight, config.kl_weight, config.u_weight, config.connectivity) == (0.5, 0.05, 0.5, 8)
    assert (config.pre_val_from, config.pre_val_every, config.self_val_every) == (5650, 565, 200)
    assert (config.labelled_repeat, config.unlabelled_repeat, config.shuffle) == (10, 10, False)
    assert (config.dice, config.pre_dice, config.pseudo_label_rule, config.ema_buffers) == (
        "batch",
        "regions",
        "argmax",
        True,
    )
    assert (config.student_a, config.student_b, config.mask_fraction) == ("unet", "resunet", 2 / 3)
    assert (config.augment_probability, config.max_angle_deg, config.precision) == (0.5, 20, "fp32")


BAD_SETTINGS = {
    "unknown flag": (["--labelnun", "3"], "unknown argument --labelnun: did you mean --labelnum"),
    "patch size": (["--patch_size", "100", "96"], "--patch_size is 100 96: every side must be a multiple of 16"),
    "labelnum": (["--labelnum", "9"], "--labelnum is 9: choose 1 to 4"),
    "no labels": (["--labelnum", "0"], "--labelnum is 0: it must be above 0"),
    "no unlabelled": (["--labelnum", "4"], "leaves no unlabelled patients"),
    "batch": (["--batch_size", "500"], "--batch_size 500 is more than the"),
    "zero batch": (["--batch_size", "0"], "--batch_size is 0: it must be above 0"),
    "ema": (["--ema_decay", "1.5"], "--ema_decay is 1.5"),
    "mask": (["--mask_fraction", "1"], "--mask_fraction is 1.0: a mask of 1.0 of"),
    "angle": (["--max_angle_deg", "-5"], "--max_angle_deg is -5"),
    "connectivity": (["--connectivity", "26"], "--connectivity is 26: slices know 4 or 8"),
    "rule": (["--pseudo_label_rule", "threshold"], "--pseudo_label_rule threshold is for two classes"),
    "negative weight": (["--u_weight", "-1"], "--u_weight is -1"),
    "learning rate": (["--base_lr", "0"], "--base_lr is 0"),
    "root": (["--root_path", "/nowhere/acdc"], "no ACDC data in"),
    "pretrained": (["--pretrained", "/nowhere/run"], "--pretrained /nowhere/run is no run's folder ("),
    "nothing to start from": (
        ["--pre_iterations", "0"],
        "--pre_iterations 0 leaves self-training nothing to start from",
    ),
    "tiny box": (["--mask_fraction", "0.01"], "--mask_fraction is 0.01: a mask of"),
    "tiny patch": (["--patch_size", "16", "16"], "--patch_size is 16 16: it leaves a single voxel"),
    "repeat": (["--unlabelled_repeat", "-1"], "--unlabelled_repeat is -1: it must be above 0"),
    "models folder": (["--models_path", "/dev/null/models"], "Not a directory"),
}


@pytest.mark.parametrize("kind", BAD_SETTINGS)
def test_bad_settings_end_in_a_sentence(kind, acdc_phantom, tmp_path, monkeypatch):
    arguments, message = BAD_SETTINGS[kind]
    script = load("ACDC_train.py")
    base = ["--root_path", str(acdc_phantom), "--models_path", str(tmp_path), *TINY, *SHORT]
    monkeypatch.setattr(sys, "argv", ["script", *base, *arguments])
    with pytest.raises(SystemExit) as error:
        run_script(script.main, script.Config)
    assert message in str(error.value) and str(error.value).startswith("error: ") and "\n" not in str(error.value)
    assert not list(tmp_path.glob("*/*/*.pth"))  # nothing was trained


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(acdc_phantom, tmp_path):
    script = load("ACDC_train.py")
    with pytest.raises(UserError, match="--device cuda was asked for but PyTorch sees no CUDA GPU"):
        script.main(parse(script.Config, ["--root_path", str(acdc_phantom), "--device", "cuda"]))


def damage_missing(root):
    (root / "data" / "slices" / "patient003_frame01_slice_1.h5").unlink()


def damage_validation(root):
    write_h5(root / "data" / "patient005_frame02.h5", image=torch.zeros(2, 4, 4).numpy())


def damage_list(root):
    (root / "data_split" / "train_slices.list").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, "patient003_frame01_slice_1.h5 does not exist"),
        (damage_validation, "patient005_frame02.h5 has no `label`"),
        (damage_list, "train_slices.list does not exist"),
    ],
)
def test_every_file_is_checked_before_training(acdc_phantom, tmp_path, damage, message):
    root = shutil.copytree(acdc_phantom, tmp_path / "acdc")
    damage(root)
    script = load("ACDC_train.py")
    with pytest.raises(UserError, match=message):
        script.main(parse(script.Config, ["--root_path", str(root), "--models_path", str(tmp_path), *TINY, *SHORT]))
    assert not list(tmp_path.glob("acdc_SDCL*"))


@pytest.mark.parametrize(
    ("content", "message"), [(None, "config.json does not exist: train first"), ("{", "config.json cannot be read")]
)
def test_testing_without_a_run(acdc_phantom, tmp_path, content, message):
    if content:
        (tmp_path / "acdc_SDCL_7_labeled").mkdir()
        (tmp_path / "acdc_SDCL_7_labeled" / "config.json").write_text(content)
    script = load("test_ACDC.py")
    with pytest.raises(UserError, match=message):
        script.main(parse(script.Config, ["--root_path", str(acdc_phantom), "--models_path", str(tmp_path)]))


@pytest.mark.parametrize(
    ("name", "is_heard"),
    [("SIGINT", True), pytest.param("SIGTERM", True, marks=pytest.mark.slow), ("SIGTERM", False)],
)
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals between processes")
def test_a_signal_saves_and_the_same_command_goes_on(acdc_phantom, tmp_path, name, is_heard):
    """Also where what read the output is gone, as with Ctrl-C and `| tee`, which ends both."""
    settings = ["--pre_iterations", "60", "--self_iterations", "0", "--pre_val_every", "0", "--save_every", "1000"]
    command = [
        sys.executable,
        str(ROOT / "code" / "ACDC_train.py"),
        "--root_path",
        acdc_phantom,
        "--models_path",
        tmp_path,
    ]
    command = [*map(str, command), *TINY, "--log_every", "1", *settings]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("pre_train 3:"):
            if not is_heard:
                process.stdout.close()
            process.send_signal(getattr(signal, name))
            break
    if is_heard:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + getattr(signal, name) and "stopped and saved after iteration" in output
    process.wait(timeout=60)
    last = tmp_path / "acdc_SDCL_2_labeled" / "pre_train" / "last.pth"
    assert 3 <= checkpoints.load(last)["iteration"] < 60
    script = load("ACDC_train.py")
    script.main(parse(script.Config, command[2:]))
    assert checkpoints.load(last)["iteration"] == 60
    assert len((last.parent / "metrics.csv").read_text().splitlines()) == 61
