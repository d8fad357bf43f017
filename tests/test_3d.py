"""LA and Pancreas: crops, splits, sliding windows, scripts, and more than two classes."""

import dataclasses
import importlib.util
import json
import math
import re
import shutil
import sys
from types import SimpleNamespace

import h5py
import nibabel
import numpy as np
import pytest
import torch
from helpers import GOLDEN, ROOT, method, write_h5
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dataloaders import la, pancreas
from dataloaders.cache import Decoding
from dataloaders.files import read_list, sample_rng
from dataloaders.phantom import write_la
from dataloaders.transforms import Cropping, crop_corner, cropped
from dataloaders.volumes import CroppedVolumes, read_volumes, split_labelled
from sdcl.inference import Windows, sliding_window, window_slabs, window_starts
from sdcl.runs.config import parse
from sdcl.runs.data import Training
from sdcl.runs.errors import UserError
from sdcl.runs.experiment import train
from sdcl.scoring.evaluation import Decision, Task

MODULES = {"la": la, "pancreas": pancreas}
SCRIPTS = {"la": ("LA_train.py", "test_LA.py"), "pancreas": ("pancreas/Pancreas_train.py", "pancreas/test_Pancreas.py")}
TINY = ["--patch_size", "32", "16", "16", "--labelnum", "2", "--device", "cpu", "--pre_iterations", "2",
        "--self_iterations", "2", "--stride", "16", "16", "16", "--unlabelled_repeat", "2"]  # fmt: skip


def load(script):
    name = script.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, ROOT / "code" / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def call(script, *arguments):
    module = load(script)
    module.main(parse(module.Config, [str(a) for a in arguments]))


# --- crops and splits ---


def published_crop(array, patch, rng):
    """The crop as the method describes it: pad everything first, then cut."""
    if any(side <= p for side, p in zip(array.shape, patch, strict=True)):
        array = np.pad(array, [(max((p - side) // 2 + 1, 0),) * 2 for side, p in zip(array.shape, patch, strict=True)])
    rooms = [side - p for side, p in zip(array.shape, patch, strict=True)]
    corner = [round(r / 2) if rng is None else int(rng.integers(r)) for r in rooms]
    return array[tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(2, 14), min_size=3, max_size=3), st.lists(st.integers(2, 10), min_size=3, max_size=3),
       st.integers(0, 2**31), st.booleans())  # fmt: skip
def test_crops_are_the_published_ones(shape, patch, seed, is_random):
    array = np.random.default_rng(seed).random(shape).astype(np.float32) + 1
    one, two = (np.random.default_rng(seed) if is_random else None for _ in range(2))
    result = cropped(array, *crop_corner(shape, patch, one), patch)
    np.testing.assert_array_equal(result, published_crop(array, patch, two))


def test_crops_of_a_case_follow_the_generator_and_image_and_label_agree(tmp_path):
    label = (np.arange(8 * 9 * 10).reshape(8, 9, 10) % 2).astype(np.uint8)
    path = write_h5(tmp_path / "a.h5", image=label.astype(np.float32), label=label)
    volumes = CroppedVolumes({"a": path}, Decoding(2, True, 1, "float16"), Cropping((4, 4, 4)))
    crops = [volumes.sample(0, sample_rng(k))[0] for k in range(30)]
    for k in range(30):
        image, target = volumes.sample(0, sample_rng(k))
        assert image.dtype == np.float32 and target.dtype == np.uint8
        assert image.shape == (1, 4, 4, 4)
        np.testing.assert_array_equal(image[0], target)
        np.testing.assert_array_equal(image, crops[k])
    assert len({crop.tobytes() for crop in crops}) > 1


def test_splits():
    names = [f"c{k}" for k in range(6)]
    assert split_labelled(names, 2) == (names[:2], names[2:], [])
    assert split_labelled(names, 2, 1) == (names[:2], names[2:5], names[5:])
    assert split_labelled(names, 6) == (names, [], [])
    for labelnum in (1, 7):
        with pytest.raises(UserError, match=f"--labelnum is {labelnum}: choose 2 to 6"):
            split_labelled(names, labelnum)
    with pytest.raises(UserError, match="--val_cases is 4, but only 4 training cases are unlabelled"):
        split_labelled(names, 2, 4)


# --- sliding window ---

FIGURES = np.load(GOLDEN / "sliding_window.npz")


def golden_network(k):
    network = nn.Conv3d(1, 2, 3, padding=1)
    network.weight.data = torch.from_numpy(FIGURES[f"weight{k}"]).reshape(network.weight.shape)
    network.bias.data = torch.from_numpy(FIGURES[f"bias{k}"])
    return network


def test_golden_windows_of_one_network_and_of_two():
    networks = [golden_network(1), golden_network(2)]
    one, two = sliding_window(networks, FIGURES["volume"], (16, 16, 12), (6, 6, 4), 2, batch_size=3)
    np.testing.assert_allclose(one[1], FIGURES["las_big"], atol=2e-6)
    mean = (one + two) / 2
    for p, threshold, argmax in ((one, "la_big", "p_big"), (mean, "lam_big", "pm_big")):
        clear = np.abs(p[1] - 0.5) > 1e-6  # the rest are ties, decided by the order of a float sum
        assert clear.mean() > 0.99
        for rule, name in (("threshold", threshold), ("argmax", argmax)):
            np.testing.assert_array_equal(Decision(rule)(p)[clear], FIGURES[name][clear])


def plain_window(network, volume, patch, stride):
    """Pad, visit every place of the grid, add, count, divide, crop: the textbook's way."""
    pads = [max(p - side, 0) for side, p in zip(volume.shape, patch, strict=True)]
    padded = np.pad(volume, [(p // 2, p - p // 2) for p in pads])
    total, count = np.zeros((2, *padded.shape)), np.zeros(padded.shape)
    counts = [math.ceil((side - p) / s) + 1 for side, p, s in zip(padded.shape, patch, stride, strict=True)]
    for place in np.ndindex(*counts):
        at = tuple(
            slice(min(s * i, side - p), min(s * i, side - p) + p)
            for i, s, side, p in zip(place, stride, padded.shape, patch, strict=True)
        )
        with torch.no_grad():
            total[(slice(None), *at)] += torch.softmax(network(torch.from_numpy(padded[at])[None, None]), 1)[0].numpy()
        count[at] += 1
    inside = tuple(slice(p // 2, p // 2 + side) for p, side in zip(pads, volume.shape, strict=True))
    return (total / count)[(slice(None), *inside)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(3, 20), min_size=3, max_size=3), st.lists(st.integers(1, 8), min_size=3, max_size=3),
       st.integers(1, 7))  # fmt: skip
def test_windows_of_volumes_larger_than_equal_to_and_smaller_than_the_patch(shape, stride, batch_size):
    volume = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    network = golden_network(1)
    (result,) = sliding_window([network], volume, (8, 8, 10), stride, 2, batch_size)
    assert result.shape == (2, *shape) and result.dtype == np.float32
    np.testing.assert_allclose(result, plain_window(network, volume, (8, 8, 10), stride), atol=1e-5)


def test_what_the_device_sums_is_bounded(monkeypatch):
    """However long a volume is, the device holds the sums of the planes that a few windows reach."""
    shapes, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **how: shapes.append(size) or zeros(*size, **how))
    volume = np.random.default_rng(0).random((100, 12, 9)).astype(np.float32)
    found = window_slabs([golden_network(1)], volume, Windows((8, 8, 8), (4, 4, 4), 2, 3))
    slabs = [(where, [one.copy() for one in ones]) for where, ones in found]
    assert max(size[1] for size in shapes if len(size) == 4) <= 12
    assert [where.start for where, _ in slabs] == [0, *(where.stop for where, _ in slabs[:-1])]
    assert slabs[-1][0].stop == 100 and max(one[0].shape[1] for _, one in slabs) <= 12
    whole = sliding_window([golden_network(1)], volume, (8, 8, 8), (4, 4, 4), 2, 3)[0]
    np.testing.assert_array_equal(np.concatenate([one[0] for _, one in slabs], axis=1), whole)


@pytest.mark.parametrize(
    "shape, stride, message",
    [((9, 9), (4, 4, 4), "three sides"), ((9, 9, 9), (9, 4, 4), "leave gaps"), ((9, 9, 9), (4, 4, 0), "leave gaps")],
)
def test_a_grid_that_leaves_gaps_is_refused(shape, stride, message):
    with pytest.raises(ValueError, match=message):
        sliding_window([golden_network(1)], np.zeros(shape, np.float32), (8, 8, 8), stride, 2)


def test_the_published_grid():
    assert window_starts(112, 112, 18) == [0]
    assert window_starts(140, 112, 18) == [0, 18, 28]
    assert window_starts(148, 112, 18) == [0, 18, 36]


class Pointwise(nn.Module):
    """A network for which windows, weights and flips change nothing."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.windows = 0

    def forward(self, x):
        self.windows += len(x)
        return torch.cat([torch.zeros_like(x), self.scale * x, -x], dim=1)


def test_weighting_and_flips_leave_a_pointwise_network_alone():
    volume = np.random.default_rng(0).standard_normal((11, 9, 13)).astype(np.float32)
    expected = torch.softmax(Pointwise()(torch.from_numpy(volume)[None, None]), 1)[0].detach().numpy()
    for options, passes in (({}, 1), ({"weighting": "gaussian"}, 1), ({"tta": True}, 8)):
        networks = [Pointwise(), Pointwise()]
        results = sliding_window(networks, volume, (8, 8, 8), (3, 4, 5), 3, 2, **options)
        assert [n.windows for n in networks] == [2 * 2 * 2 * passes] * 2  # every window once for each network
        for result in results:
            np.testing.assert_allclose(result, expected, atol=1e-5)


def test_gaussian_windows_trust_their_centres():
    """A network that is right only at a window's centre: the weighting must help."""

    class Centre(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.tensor(0.0))

        def forward(self, x):
            logit = torch.full_like(x, -2.0)
            logit[:, :, 2:6, 2:6, 2:6] = 2.0
            return torch.cat([torch.zeros_like(x), logit + self.bias], dim=1)

    volume = np.zeros((16, 16, 16), np.float32)
    constant, gaussian = (
        sliding_window([Centre()], volume, (8, 8, 8), (2, 2, 2), 2, weighting=w)[0][1, 6:10, 6:10, 6:10].mean()
        for w in ("constant", "gaussian")
    )
    assert gaussian > constant + 0.2


# --- scripts ---


@pytest.fixture(scope="module", params=[pytest.param("la", marks=pytest.mark.slow), "pancreas"])
def trained(request, scratch):
    """Train both stages with validation on a held-out case, from a data set whose unlabelled files have no label."""
    name = request.param
    root = shutil.copytree(request.getfixturevalue(f"{name}_phantom"), scratch / "data" / name)
    train_names = read_list(root / "data_split" / "train.txt")
    with h5py.File(MODULES[name].path_of(root, train_names[2]), "a") as file:
        del file["label"]
    models = scratch / f"models_{name}"
    call(SCRIPTS[name][0], "--root_path", root, "--models_path", models, *TINY, "--select", "val", "--val_cases", 1)
    return name, root, models


def test_train_and_test_scripts(trained, capsys):
    name, root, models = trained
    folder = models / f"{name}_SDCL_2_labeled"
    assert (folder / "self_train" / "best_mean.pth").exists()
    options = [
        "--spacing",
        "2",
        "1",
        "0.5",
        "--save_nifti",
        "--tta",
        "--largest_component",
        "--window_weighting",
        "gaussian",
    ]
    call(
        SCRIPTS[name][1],
        "--root_path",
        root,
        "--models_path",
        models,
        "--labelnum",
        2,
        "--stride",
        16,
        16,
        16,
        *options,
    )
    output = capsys.readouterr().out
    for words in ("mean, best on val and last (2)", "95HD [mm]", "over 2 cases", "metrics.png"):
        assert words in output, words
    assert "NOTE" not in output
    written = folder / "test" / "self_train_test_gaussian_tta_largest_component"
    summary = json.loads((written / "summary.json").read_text())
    assert summary["selected_on"] == "val" and summary["config"]["stride"] == [16, 16, 16]
    case = read_list(root / "data_split" / "test.txt")[0]
    with h5py.File(MODULES[name].path_of(root, case)) as file:
        for kind, dataset in (("image", "image"), ("label", "label")):
            picture = nibabel.load(written / "nifti" / f"{case}_{kind}.nii.gz")
            np.testing.assert_array_equal(np.asarray(picture.dataobj), file[dataset][()])
            assert picture.header.get_zooms() == (2, 1, 0.5)
    prediction, probability = (
        np.asarray(nibabel.load(written / "nifti" / f"{case}_{kind}.nii.gz").dataobj)
        for kind in ("prediction", "probability")
    )
    assert ((prediction == 1) <= (probability >= 0.5)).all()


def test_without_validation_there_is_only_the_last(pancreas_phantom, tmp_path, capsys):
    """Here of students at half the resolution."""
    where = ["--root_path", pancreas_phantom, "--models_path", tmp_path]
    lowres = ["--student_a", "vnet_lowres", "--student_b", "resvnet_lowres", "--patch_size", 64, 32, 32]
    call("pancreas/Pancreas_train.py", *where, *TINY, "--select", "last", *lowres)
    call("pancreas/test_Pancreas.py", *where, "--labelnum", 2, "--stride", 16, 16, 16, "--student_a", "resvnet")
    output = capsys.readouterr().out
    assert "mean, last (2)" in output and "best on" not in output
    assert "networks vnet_lowres and resvnet_lowres" in output
    assert re.findall("NOTE: --.*", output) == ["NOTE: --student_a is not used: the run's own is vnet_lowres."]


PUBLISHED = {
    "la": {
        "labelnum": 8, "pre_iterations": 3200, "self_iterations": 11_000, "patch_size": (112, 112, 80), "batch_size": 2,
        "mse_weight": 0.5, "kl_weight": 0.05, "connectivity": 26, "stride": (18, 18, 4), "labelled_repeat": 10,
        "unlabelled_repeat": 10, "unlabelled_crop": "random", "decision_rule": "threshold", "pre_val_every": 200,
        "self_val_every": 200,
    },
    "pancreas": {
        "labelnum": 12, "pre_iterations": 3030, "self_iterations": 8025, "patch_size": (96, 96, 96), "batch_size": 2,
        "mse_weight": 0.3, "kl_weight": 0.1, "connectivity": 18, "stride": (16, 16, 4), "labelled_repeat": 5,
        "unlabelled_repeat": 1, "unlabelled_crop": "centre", "decision_rule": "argmax", "pre_val_every": 150,
        "self_val_every": 500, "late_val_from": 4000, "late_val_every": 125,
    },
}  # fmt: skip
SHARED = {
    "base_lr": 1e-3, "u_weight": 0.5, "dice": "sample", "pre_dice": "whole", "pseudo_label_rule": "threshold",
    "ema_decay": 0.99, "ema_buffers": False, "mask_fraction": 2 / 3, "select": "test", "shuffle": False,
    "student_a": "vnet", "student_b": "resvnet", "precision": "fp32",
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_defaults_are_the_published_runs(name):
    config = parse(load(SCRIPTS[name][0]).Config, [])
    expected = PUBLISHED[name] | SHARED
    assert {key: getattr(config, key) for key in expected} == expected
    tested = parse(load(SCRIPTS[name][1]).Config, [])
    for key in ("stride", "patch_size", "decision_rule", "labelnum"):
        assert getattr(tested, key) == expected[key]
    assert (tested.window_weighting, tested.tta, tested.largest_component) == ("constant", False, False)


def test_spacing_must_be_positive(la_phantom, tmp_path):
    with pytest.raises(UserError, match="--spacing is 0.0 1.0 1.0: every side must be above 0 mm"):
        call("test_LA.py", "--root_path", la_phantom, "--models_path", tmp_path, "--spacing", 0, 1, 1)


BAD_SETTINGS = {
    "patch size": (["--patch_size", "32", "24", "16"], "every side must be a multiple of 16, since the networks"),
    "half the resolution": (
        ["--student_b", "resvnet_lowres", "--patch_size", "64", "48", "32"],
        "--patch_size is 64 48 32: every side must be a multiple of 32, since resvnet_lowres halves it five times",
    ),
    "one voxel at half the resolution": (
        ["--student_a", "vnet_lowres", "--patch_size", "32", "32", "32"],
        "--patch_size is 32 32 32: it leaves a single voxel at the networks' bottom, which no normalisation can use: "
        "make a side 64 or more.",
    ),
    "one labelled": (["--labelnum", "1"], "--labelnum is 1: choose 2 to 4"),
    "all labelled": (["--labelnum", "4"], "leaves no unlabelled cases"),
    "connectivity": (["--connectivity", "8"], "--connectivity is 8: volumes know 6, 18 or 26"),
    "gaps": (["--stride", "33", "8", "8"], "--stride is 33 8 8: every step must lie between 1 and"),
    "no val cases": (["--select", "val"], "--select val needs cases to validate on"),
    "window batch": (["--window_batch", "0"], "--window_batch is 0: it must be above 0"),
    "negative val cases": (["--select", "val", "--val_cases", "-1"], "--val_cases is -1: it must not be negative"),
    "one voxel": (["--patch_size", "16", "16", "16"], "--patch_size is 16 16 16: it leaves a single voxel"),
    "val and test": (["--val_cases", "1"], "--select test and --val_cases contradict"),
    "root": (["--root_path", "/nowhere"], "(--root_path): expected data/"),
}


@pytest.mark.parametrize("name", ["la", "pancreas"])
@pytest.mark.parametrize("kind", BAD_SETTINGS)
def test_bad_settings(name, kind, request, tmp_path):
    arguments, message = BAD_SETTINGS[kind]
    root = request.getfixturevalue(f"{name}_phantom")
    with pytest.raises(UserError) as error:
        call(SCRIPTS[name][0], "--root_path", root, "--models_path", tmp_path, *TINY, *arguments)
    assert message in str(error.value) and not list(tmp_path.iterdir())


IMAGE = np.arange(8000, dtype=np.float32).reshape(20, 20, 20)
LABEL = np.full(IMAGE.shape, 255.0)
BAD_CASES = {
    "missing": (None, "does not exist: restore it, or take its name out of the list"),
    "two dimensions": ({"image": IMAGE[0], "label": IMAGE[0]}, r"shape \(20, 20\), it needs 3 dimensions"),
    "nan": ({"image": IMAGE * np.nan, "label": IMAGE}, "nan or infinite"),
    "not binary": ({"image": IMAGE, "label": LABEL}, "`label` holds 255.0, outside the classes 0 to 1"),
}


@pytest.mark.parametrize("name", ["la", "pancreas"])
@pytest.mark.parametrize("kind", BAD_CASES)
def test_bad_cases_are_named_before_training(name, kind, request, tmp_path):
    root = shutil.copytree(request.getfixturevalue(f"{name}_phantom"), tmp_path / "data")
    path = MODULES[name].path_of(root, read_list(root / "data_split" / "train.txt")[1])
    content, message = BAD_CASES[kind]
    path.unlink()
    if content:
        write_h5(path, **content)
    with pytest.raises(UserError, match=message) as error:
        call(SCRIPTS[name][0], "--root_path", root, "--models_path", tmp_path / "models", *TINY)
    assert str(path) in str(error.value) and not (tmp_path / "models").exists()


def test_a_test_case_among_the_training_cases(la_phantom, tmp_path):
    root = shutil.copytree(la_phantom, tmp_path / "data")
    train_list, test = root / "data_split" / "train.txt", read_list(root / "data_split" / "test.txt")
    train_list.write_text(train_list.read_text() + test[0] + "\n")
    with pytest.raises(UserError, match=f"both name {test[0]}"):
        call("LA_train.py", "--root_path", root, "--models_path", tmp_path / "models", *TINY)


@pytest.mark.slow
def test_three_classes_from_data_to_table(tmp_path):
    """The same loops, with argmax and a component for each class."""
    root = write_la(tmp_path / "data", cases=(3, 1), labelled_cases=2, size=(40, 36, 32), classes=3)
    from dataloaders.streams import Order, Streams

    names = read_list(root / "data_split" / "train.txt")
    labelled, unlabelled = (
        CroppedVolumes({n: la.path_of(root, n) for n in part}, Decoding(3, has, 1), Cropping((32, 16, 16)))
        for part, has in ((names[:2], True), (names[2:], False))
    )
    config = SimpleNamespace(
        **vars(method(pre_iterations=2, self_iterations=2, dice="sample", pre_dice="whole", connectivity=26)),
        student_a="vnet", student_b="resvnet", base_lr=1e-3, weight_decay=0.0, models_path=tmp_path / "models",
        optimiser="adam", exp="three", labelnum=2, pretrained=None, deterministic=False, select="val", device="cpu",
        gpu=0, pre_val_every=0, self_val_every=0, batch_size=2, patch_size=(32, 16, 16),
    )  # fmt: skip
    config = dataclass_of(config)

    def infer(networks, volume):
        return window_slabs(networks, volume, Windows((32, 16, 16), (16, 16, 16), 3))

    three = dataclasses.replace(la.DATA_SET, class_names=("body", "veins"))
    cases = read_volumes(read_list(root / "data_split" / "test.txt"), root, three)
    assert {0, 1, 2} == set(np.unique(cases[0].label))
    given = Training(
        task=Task("la", ("body", "veins"), infer, planes=(2, 1, 0)),
        streams=lambda stage: Streams(labelled, unlabelled if stage == "self_train" else None, Order(2, 2, 4)),
        lists={"train": names}, trained_on=names, validation_cases=cases, validated_on="val", facts={},
    )  # fmt: skip
    train(config, SimpleNamespace(check_root=lambda: None, check=lambda: None, training=lambda needs_unlabelled: given))
    assert (tmp_path / "models" / "la_three_2_labeled" / "self_train" / "best_mean.pth").exists()


def dataclass_of(namespace):
    """Make a dataclass instance of a namespace, as scripts' headers are."""
    from dataclasses import make_dataclass

    return make_dataclass("Config", vars(namespace))(**vars(namespace))
