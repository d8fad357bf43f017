"""What is said before a run starts: memory by the layers' own account, what would fit, and when it ends."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import method
from test_honest_runs import VOLUMES, main
from test_reuse import SLICES
from torch import nn

from sdcl.runs import ahead, experiment
from sdcl.runs.ahead import GIB, Plan, kept_bytes, plan_of, tell_memory, tell_memory_of_test, what_fits
from sdcl.runs.errors import UserError
from sdcl.scoring.evaluation import Predictors

CPU = torch.device("cpu")


def header(**changes):
    sizes = {"student_a": "unet", "student_b": "resunet", "batch_size": 4, "patch_size": (32, 48)}
    return SimpleNamespace(**(vars(method()) | sizes | changes))


def test_what_a_forward_pass_keeps_is_counted_by_hand(monkeypatch):
    """A convolution keeps its input, a ReLU its output: 2 x 1 x 16 x 16 and 2 x 3 x 16 x 16 numbers of 4 bytes."""

    def net(name, classes, channels):
        return nn.Sequential(nn.Conv2d(channels, classes, 3, padding=1), nn.ReLU())

    monkeypatch.setattr(ahead, "build_network", net)
    assert kept_bytes("by hand", 3, (2, 1, 16, 16), False) == 4 * 2 * 256 * (1 + 3)


@pytest.mark.parametrize("name", ["vnet", "resvnet"])
def test_memory_grows_with_the_batch_and_shrinks_in_bf16(name):
    one, two = (kept_bytes(name, 2, (n, 1, 32, 32, 32), False) for n in (1, 2))
    assert 1.9 < two / one < 2.1
    assert kept_bytes(name, 2, (2, 1, 64, 64, 64), True) < 0.7 * kept_bytes(name, 2, (2, 1, 64, 64, 64), False)


def test_a_stage_holds_what_its_step_trains_together():
    first, second, bcp = (
        plan_of(header(**more), (4, 1), stage, CPU)
        for stage, more in (("pre_train", {}), ("self_train", {}), ("self_train", {"method": "bcp"}))
    )
    assert first.students == ("resunet",) and first.copies == ()
    assert second.students == ("unet", "resunet") and second.copies == ("unet",) and bcp.students == ("unet",)
    assert second.gib > first.gib > 0 and first.shape == (4, 1, 32, 48)
    assert plan_of(header(average_decay=0.9), (4, 1), "self_train", CPU).copies == ("unet", "unet", "resunet")


@pytest.mark.parametrize(
    ("changes", "together"), [({}, True), ({"cuda_graphs": False}, False), ({"compile": True}, False)]
)
def test_recorded_passes_keep_what_both_students_leave_in_stage_1(changes, together):
    plan = plan_of(header(**changes), (4, 1), "pre_train", torch.device("cuda"))
    assert plan.students == (("unet", "resunet") if together else ("resunet",)) and plan.copies == ()


def test_patches_that_would_fit_are_ones_that_the_networks_take():
    """By stage 1's heavier student, or a method's only one, as little as by both."""
    mixed = {"student_a": "vnet", "student_b": "resvnet_lowres", "batch_size": 1, "patch_size": (160, 96, 96)}
    config = header(**mixed, precision="bf16", method="bcp")
    assert plan_of(config, (2, 1), "self_train", CPU).smaller()[0][0] == "--patch_size 96 64 64"
    plan = plan_of(config, (2, 1), "pre_train", CPU)
    assert plan.students == ("vnet",)
    said = dict(plan.smaller())
    assert list(said) == ["--patch_size 96 64 64", "--patch_size 64 64 64"]
    assert said["--patch_size 64 64 64"].gib < said["--patch_size 96 64 64"].gib < plan.gib
    full = replace(plan, shape=(1, 1, 80, 48, 32), divisor=16)
    assert list(dict(full.smaller())) == ["--patch_size 48 32 32", "--patch_size 32 32 32"]
    two = replace(full, shape=(2, 1, 48, 48, 32), precision="fp32").smaller()
    sizes = ("", "--batch_size 1", "--patch_size 32 32 32 --batch_size 1")
    in_bf16 = [f"{flags} --precision bf16".strip() for flags in sizes]
    assert [text for text, _ in two] == [in_bf16[0], sizes[1], in_bf16[1], sizes[2], in_bf16[2]]
    assert [(plan.shape[0], plan.shape[2], plan.precision) for _, plan in two] == [
        (2, 48, "bf16"), (1, 48, "fp32"), (1, 48, "bf16"), (1, 32, "fp32"), (1, 32, "bf16"),
    ]  # fmt: skip


def test_what_does_not_fit_is_told_with_settings_that_do(monkeypatch, said):
    said()
    plan = Plan(("vnet", "resvnet"), ("vnet",), 2, (4, 1, 64, 64, 48), "fp32", 16)
    monkeypatch.setattr(ahead, "computes_bf16", lambda device: False)
    monkeypatch.setattr(ahead, "free_gib", lambda device: 0.6 * plan.gib)
    tell_memory([("self_train", plan)], CPU)
    told = said()
    assert re.search(r"memory: about [\d.]+ GiB in self_train; [\d.]+ GiB are free on cpu", told)
    assert re.search(r"WARNING: that is more than there is: --batch_size [12] would take about", told)
    monkeypatch.setattr(ahead, "computes_bf16", lambda device: True)
    assert what_fits(plan, 0.8 * plan.gib, CPU).startswith("--precision bf16 would take")
    assert "--patch_size" in what_fits(plan, 0.3 * plan.gib, CPU) or "bf16" in what_fits(plan, 0.3 * plan.gib, CPU)
    assert what_fits(plan, 0.01, CPU) == "no batch or patch of these networks fits: use another device."
    monkeypatch.setattr(ahead, "free_gib", lambda device: 100.0)
    tell_memory([("self_train", plan)], CPU)
    assert "WARNING" not in said()
    monkeypatch.setattr(ahead, "free_gib", lambda device: 0.001)
    monkeypatch.setattr(ahead, "held_gib", lambda: 0.0)
    three = Predictors([None, None], {"a": (0,), "b": (1,), "mean": (0, 1)})
    # 10 million voxels: 4 bytes of the image, 1 of the reference, 3 of the labels; 200 of 1000 planes of 3 maps of 4
    # classes; where the mean is kept 4 more maps.
    for kept, gib in (((), 8 * 10**7 + 4 * 4 * 3 * 2 * 10**6), (("mean",), 24 * 10**7 + 4 * 4 * 3 * 2 * 10**6)):
        tell_memory_of_test(replace(three, kept=kept), (4, 1), (1000, 100, 100), 200, CPU)
        told = said()
        assert f"memory: about {gib / GIB:.1f} GiB for the largest volume" in told and "score fewer predictors" in told


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_a_full_memory_ends_in_one_sentence(error, monkeypatch):
    monkeypatch.setattr(ahead, "computes_bf16", lambda device: False)
    monkeypatch.setattr(ahead, "free_gib", lambda device: 100.0)
    published = header(batch_size=12, patch_size=(256, 256))
    with pytest.raises(UserError, match="the memory of cpu is full in self_train: --batch_size 6 would take about"):
        with experiment.told_of_memory(published, (4, 1), "self_train", CPU):
            raise error
    with pytest.raises(RuntimeError, match="another"), experiment.told_of_memory(header(), (4, 1), "self_train", CPU):
        raise RuntimeError("another")


def test_runs_and_tests_say_what_they_take_and_when_they_end(acdc_phantom, la_phantom, tmp_path):
    where = ["--models_path", tmp_path, "--root_path"]
    said = main("ACDC_train.py", *where, acdc_phantom, *SLICES, "--pre_iterations", 6, "--self_iterations", 1)
    assert re.search(r"memory: about [\d.]+ GiB in pre_train, [\d.]+ GiB in self_train", said)
    assert re.search(r"pre_train: about \d+ s for 2 more iterations, validations apart, so until \w+ \d\d:\d\d", said)
    assert "self_train: about" not in said  # one iteration tells nothing
    main("LA_train.py", *where, la_phantom, *VOLUMES, "--pre_iterations", 1, "--self_iterations", 0, "--select", "last")
    more = ["--labelnum", 2, "--stage", "pre_train", "--stride", 32, 16, 16, "--device", "cpu"]
    said = main("test_LA.py", *where, la_phantom, *more)
    assert re.search(r"memory: about [\d.]+ GiB for the largest volume", said)
    assert re.search(r"scored; about \d+ s for the other 1", said)
