import csv
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import time
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import GOLDEN, fill, method, strided
from torch import nn

from sdcl import checkpoints
from sdcl.methods import get
from sdcl.methods.sdcl import self_train_step
from sdcl.mixing import copy_paste_mask
from sdcl.networks import build_network, resnet, unet, vnet
from sdcl.runs.errors import UserError
from sdcl.scoring.report import Validation
from sdcl.steps import add_teacher
from sdcl.training import (
    iteration_seed,
    make_learners,
    pretrain,
    pretrain_step,
    self_train,
    validation_iterations,
)


@pytest.fixture(autouse=True)
def narrow(request, monkeypatch):
    """The same networks with few filters; the golden figures are of all of them."""
    if "golden" not in request.node.name:
        for module in (resnet, unet, vnet):
            monkeypatch.setattr(module, "WIDTHS", (2, 4, 8, 16, 32))


PANEL = np.zeros((3, 4, 4))


def without_dropout(network):
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


def test_three_golden_steps_of_self_training():
    arrays = np.load(GOLDEN / "trajectory_acdc.npz")
    figures = json.loads((GOLDEN / "trajectory_acdc.json").read_text())
    students = (without_dropout(fill(build_network(name, 4), k)) for k, name in enumerate(("unet", "resunet"), start=1))
    learners = make_learners(*students, base_lr=1e-3)
    add_teacher(learners)
    mask = torch.from_numpy(arrays["mask"])
    for network in learners.networks.values():
        network.train()
    # Adam's first steps divide rounding errors by themselves: processors differ by up to 3e-3 at the third step.
    for i, (expected, tolerance) in enumerate(zip(figures["rows"], (1e-5, 3e-3, 6e-3), strict=True)):
        batch = {key: torch.from_numpy(arrays[f"{i}/{key}"]) for key in ("x_a", "x_b", "u_a", "u_b", "y_a", "y_b")}
        losses = self_train_step(learners, batch, mask, method())
        for number, role in (("1", "student_a"), ("2", "student_b")):
            values = {name: losses[f"{role}/{name}"].item() for name in ("loss", "dice", "ce", "mse", "kl")}
            values["sup"] = (values["dice"] + values["ce"]) / 2
            for name in ("loss", "sup", "mse", "kl"):
                assert values[name] == pytest.approx(expected[name + number], rel=tolerance)
        assert losses["discrepancy"].item() == pytest.approx(expected["diff"], rel=tolerance)
    with torch.no_grad():
        output = learners.networks["teacher"].eval()(torch.from_numpy(arrays["eval_input"])).numpy()
    np.testing.assert_allclose(strided(output, 64), figures["teacher_eval"], atol=6e-3 * output.std())


class TinyStreams:
    """Random batches of 32x32, two labelled and two unlabelled."""

    iterations_per_epoch = 3

    def names(self, iteration):
        return {"x_a": [f"case{iteration}"], "x_b": ["other"]}

    def batches(self, start, stop):
        for i in range(start, stop):
            generator = torch.Generator().manual_seed(i)
            batch = {k: torch.randn(2, 1, 32, 32, generator=generator) for k in ("x_a", "x_b", "u_a", "u_b")}
            yield batch | {f"y_{d}": (batch[f"x_{d}"][:, 0] > 0).to(torch.uint8) for d in "ab"}


def tiny_learners():
    torch.manual_seed(0)
    return make_learners(build_network("unet", 2), build_network("unet", 2), base_lr=1e-3)


def score(predictors):
    """A score that moves with the weights, so that selections can be compared."""
    a, b = (float(next(s.parameters()).detach().sum() % 1) for s in predictors.networks)
    return Validation({"student_a": a, "student_b": b, "mean": (a + b) / 2}, PANEL)


def train(folder, settings, validate=score, streams=None):
    learners = tiny_learners()
    common = {"validate": validate, "config": {}, "validate_at": validation_iterations(3, 3, 8), "validated_on": "val"}
    pretrain(learners, streams or TinyStreams(), folder, settings, **common)
    self_train(learners, streams or TinyStreams(), folder, settings, start_from="best", **common)
    return learners


class Stop(Exception):
    pass


@pytest.mark.parametrize(("stage", "when"), [("pre_train", 5), ("self_train", 1), ("self_train", 8)])
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, stage, when):
    settings = method(pre_iterations=8, self_iterations=8, pseudo_label_rule="argmax", log_every=3, save_every=4)

    class Failing(TinyStreams):
        stages = 0

        def batches(self, start, stop):
            Failing.stages += 1
            for i, batch in enumerate(super().batches(start, stop), start=start + 1):
                if (stage, when) == (["pre_train", "self_train"][Failing.stages - 1], i):
                    raise Stop
                yield batch

    whole = train(tmp_path / "whole", settings)
    with pytest.raises(Stop):
        train(tmp_path / "stopped", settings, streams=Failing())
    resumed = train(tmp_path / "stopped", settings)
    for role, network in whole.networks.items():
        for name, value in network.state_dict().items():
            assert torch.equal(value, resumed.networks[role].state_dict()[name]), (role, name)
    assert whole.best == resumed.best
    for part in ("pre_train", "self_train"):
        first, second = ((tmp_path / run / part / "metrics.csv").read_text() for run in ("whole", "stopped"))
        assert first == second
        names = sorted(path.name for path in (tmp_path / "whole" / part).glob("*.pth"))
        assert names == ["best_mean.pth", "best_student_a.pth", "best_student_b.pth", "last.pth", "last_previous.pth"]
        for name in names:
            one, two = (checkpoints.load(tmp_path / run / part / name) for run in ("whole", "stopped"))
            assert one["iteration"] == two["iteration"] and one["best"] == two["best"], name
    rows = list(csv.DictReader((tmp_path / "stopped" / "pre_train" / "metrics.csv").open()))
    assert [int(row["iteration"]) for row in rows] == list(range(1, 9))
    assert [bool(row["val_dice/mean"]) for row in rows] == [i in (3, 6, 8) for i in range(1, 9)]


def test_a_finished_run_is_left_alone(tmp_path):
    settings = method(pre_iterations=2, self_iterations=2)
    train(tmp_path, settings)
    before = (tmp_path / "self_train" / "last.pth").read_bytes()

    def fail(students):
        raise AssertionError("validated again")

    train(tmp_path, settings, validate=fail)
    assert (tmp_path / "self_train" / "last.pth").read_bytes() == before


def test_the_best_is_what_was_scored(tmp_path):
    """The second validation is the best for student a, the first for the mean; the mean's file is a pair."""
    scores = iter([(0.1, 0.2, 0.9), (0.7, 0.1, 0.3), (0.3, 0.1, 0.3)])
    weights = []

    def validate(predictors):
        students = predictors.networks
        assert predictors.members == {"student_a": (0,), "student_b": (1,), "mean": (0, 1)} and predictors.shown == 3
        assert not any(s.training for s in students)
        weights.append([{k: v.clone() for k, v in s.state_dict().items()} for s in students])
        return Validation(dict(zip(("student_a", "student_b", "mean"), next(scores), strict=True)), PANEL)

    learners = tiny_learners()
    pretrain(
        learners, TinyStreams(), tmp_path, method(pre_iterations=3), validate=validate,
        validate_at=range(1, 4), validated_on="val", config={},
    )  # fmt: skip
    for name, moment, roles in (
        ("student_a", 1, ["student_a"]),
        ("student_b", 0, ["student_b"]),
        ("mean", 0, ["student_a", "student_b"]),
    ):
        saved = checkpoints.load(tmp_path / "pre_train" / f"best_{name}.pth")
        assert list(saved["networks"]) == roles and saved["iteration"] == moment + 1
        assert list(saved["optimisers"]) == roles
        for role in roles:
            expected = weights[moment][["student_a", "student_b"].index(role)]
            assert all(torch.equal(expected[key], value) for key, value in saved["networks"][role].items())


def test_every_network_is_in_train_mode_at_each_iteration_after_a_validation_too(tmp_path):
    """The teacher as well, while it makes pseudo-labels: its dropout is on and its BatchNorm uses the batch."""
    learners, modes = tiny_learners(), {}

    def spy(role, network):
        network.register_forward_hook(lambda module, *_: modes.setdefault(role, []).append(module.training))

    for role, network in learners.networks.items():
        spy(role, network)
    settings = method(pre_iterations=0, self_iterations=3)
    common = {"validate": score, "config": {}, "validate_at": {1, 2}, "validated_on": "val"}
    pretrain(learners, TinyStreams(), tmp_path, method(pre_iterations=1), **common)
    modes.clear()
    with mock.patch("sdcl.training.add_teacher", side_effect=lambda ours: _with_teacher(ours, spy)):
        self_train(learners, TinyStreams(), tmp_path, settings, start_from="last", **common)
    assert set(modes) == {"student_a", "student_b", "teacher"}
    assert all(mode for seen in modes.values() for mode in seen), modes
    assert len(modes["teacher"]) == 3 * 2  # both unlabelled batches of each iteration
    before = [b.clone() for b in learners.networks["teacher"].buffers()]
    learners.networks["teacher"](torch.randn(2, 1, 32, 32))
    assert any(not torch.equal(b, c) for b, c in zip(before, learners.networks["teacher"].buffers(), strict=True))


def _with_teacher(learners, spy):
    add_teacher(learners)
    learners.networks["teacher"]._forward_hooks.clear()  # copied from student a's
    spy("teacher", learners.networks["teacher"])


def test_self_training_starts_from_stage_one(tmp_path):
    """Before the first step: each student from its own best with its optimiser, the teacher a copy of student a."""
    settings = method(pre_iterations=4, self_iterations=1, mse_weight=0.0, kl_weight=0.0)
    pretrain(
        tiny_learners(),
        TinyStreams(),
        tmp_path,
        settings,
        validate=score,
        validate_at=range(1, 5),
        validated_on="val",
        config={},
    )
    learners = tiny_learners()

    class Peek(TinyStreams):
        def batches(self, start, stop):
            for role in ("student_a", "student_b"):
                best = checkpoints.load(tmp_path / "pre_train" / f"best_{role}.pth")
                state = learners.networks[role].state_dict()
                assert all(torch.equal(state[k], v) for k, v in best["networks"][role].items())
                moments = learners.optimisers[role].state_dict()["state"][0]
                assert torch.equal(moments["exp_avg"], best["optimisers"][role]["state"][0]["exp_avg"])
            teacher = learners.networks["teacher"].state_dict()
            assert all(torch.equal(v, teacher[k]) for k, v in learners.networks["student_a"].state_dict().items())
            assert not any(p.requires_grad for p in learners.networks["teacher"].parameters())
            raise Stop

    with pytest.raises(Stop):
        self_train(
            learners,
            Peek(),
            tmp_path,
            settings,
            validate=score,
            validate_at=(),
            validated_on="val",
            config={},
            start_from="best",
        )


def test_self_training_can_start_from_another_run_and_says_when_there_is_none(tmp_path):
    settings = method(pre_iterations=2, self_iterations=1)
    common = {"validate": score, "validate_at": (), "validated_on": "val", "config": {}}
    pretrain(tiny_learners(), TinyStreams(), tmp_path / "one", settings, **common)
    two = {"start_from": "last", "pretrained": tmp_path / "one", **common}
    self_train(tiny_learners(), TinyStreams(), tmp_path / "two", settings, **two)
    assert (tmp_path / "two" / "self_train" / "last.pth").exists()
    with pytest.raises(UserError, match="last.pth does not exist: train first"):
        self_train(tiny_learners(), TinyStreams(), tmp_path / "three", settings, start_from="last", **common)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    class Poisoned(TinyStreams):
        def batches(self, start, stop):
            for i, batch in enumerate(super().batches(start, stop), start=1):
                if i == 3:
                    batch["x_a"][0, 0, 0, 0] = math.nan
                yield batch

    wrong = r"student_a/dice.*student_b/grad_norm became nan or infinite at iteration 3 of pre_train, on the cases "
    with pytest.raises(UserError, match=wrong + "x_a: case2; x_b: other: lower"):
        train(tmp_path, method(save_every=2, log_every=4), streams=Poisoned())
    assert checkpoints.load(tmp_path / "pre_train" / "last.pth")["iteration"] == 2
    broken = checkpoints.load(tmp_path / "pre_train" / "nonfinite_3.pth")
    assert broken["iteration"] == 3 and broken["cases"] == {"x_a": ["case2"], "x_b": ["other"]}
    assert {"student_a/loss", "student_b/grad_norm"} <= set(broken["wrong"])
    assert set(broken["networks"]) == {"student_a", "student_b"} and broken["stage"] == "pre_train"


@pytest.mark.parametrize(("part", "again"), [("", False), ("", True), ("pre_train", False), ("pre_train", True)])
def test_a_folder_that_is_moved_while_training_stops_the_run_at_the_next_save(tmp_path, part, again):
    """The run's folder or its stage's; another one may have taken its place."""
    folder = tmp_path / "run"

    class Moving(TinyStreams):
        def batches(self, start, stop):
            for i, batch in enumerate(super().batches(start, stop), start=1):
                if i == 3:
                    (folder / part).rename(tmp_path / "elsewhere")
                    if again:
                        (folder / part).mkdir()
                yield batch

    common = {"validate": None, "validate_at": (), "validated_on": "val", "config": {}}
    settings = method(pre_iterations=6, save_every=2, log_every=1)
    with pytest.raises(UserError, match="pre_train was moved, removed or replaced during training; nothing more"):
        pretrain(tiny_learners(), Moving(), folder, settings, **common)
    moved = tmp_path / "elsewhere" / ("" if part else "pre_train")
    assert checkpoints.load(moved / "last.pth")["iteration"] == 2
    assert not list(folder.rglob("*.pth"))
    if again:
        (folder / part).rmdir()
    (tmp_path / "elsewhere").rename(folder / part)
    pretrain(tiny_learners(), TinyStreams(), folder, settings, **common)
    assert checkpoints.load(folder / "pre_train" / "last.pth")["iteration"] == 6


def test_a_nan_before_the_first_save_says_how_to_start_again(tmp_path):
    class Poisoned(TinyStreams):
        def batches(self, start, stop):
            for batch in super().batches(start, stop):
                batch["u_a"][0, 0, 0, 0] = math.nan
                yield batch

    settings = method(pre_iterations=2, self_iterations=2, save_every=2, log_every=1)
    common = {"validate": None, "validate_at": (), "validated_on": "val", "config": {}}
    pretrain(tiny_learners(), TinyStreams(), tmp_path / "a", settings, **common)
    with pytest.raises(UserError) as error:
        self_train(tiny_learners(), Poisoned(), tmp_path / "a", settings, start_from="last", **common)
    said = str(error.value)
    assert "nothing of self_train was saved, nonfinite_1.pth holds this state" in said and "last finite" not in said
    assert said.endswith(f"from its stage 1, give another --exp and --pretrained {tmp_path / 'a'}.")
    way = {"start_from": "last", "pretrained": tmp_path / "a"}  # which works
    self_train(tiny_learners(), TinyStreams(), tmp_path / "b", settings, **way, **common)
    assert checkpoints.load(tmp_path / "b" / "self_train" / "last.pth")["iteration"] == 2
    settings.pretrained = tmp_path / "a"
    with pytest.raises(UserError, match=rf"and --pretrained {re.escape(str(tmp_path / 'a'))}\."):
        self_train(tiny_learners(), Poisoned(), tmp_path / "c", settings, **way, **common)


def test_a_checkpoint_of_other_networks_is_refused(tmp_path):
    settings = method(pre_iterations=2)
    train(tmp_path, settings)
    shutil.rmtree(tmp_path / "self_train")
    learners = make_learners(build_network("unet", 3), build_network("unet", 3), 1e-3)
    with pytest.raises(UserError, match="last.pth does not fit a UNet: it has another shape for decoder"):
        pretrain(
            learners, TinyStreams(), tmp_path, settings, validate=score, validate_at=(), validated_on="val", config={}
        )


@pytest.mark.parametrize(
    "change",
    [{"stage": "self_train"}, {"iteration": "2"}, {"iteration": -1}, {"best": {"mean": {"dice": "1", "iteration": 1}}},
     {"best": {"x": {"dice": 1.0, "iteration": 1}}}, {"networks": 3}, {"optimisers": {}}, {"config": None}],
)  # fmt: skip
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path, change):
    settings = method(pre_iterations=1)
    common = {"validate": None, "validate_at": (), "validated_on": "val", "config": {}}
    (tmp_path / "pre_train").mkdir()
    path = tmp_path / "pre_train" / "last.pth"
    state = tiny_learners().state() | {"stage": "pre_train", "config": {}, "iteration": 2}
    checkpoints.save(state | change, path)
    with pytest.raises(UserError, match="last.pth is not a whole checkpoint of pre_train: restore a copy of it, or"):
        pretrain(tiny_learners(), TinyStreams(), tmp_path, settings, **common)


@pytest.mark.parametrize("shape", [(32, 16), (32, 16, 16)])
def test_steps_serve_two_and_three_dimensions(shape):
    names = ("unet", "resunet") if len(shape) == 2 else ("vnet", "resvnet")
    torch.manual_seed(0)
    learners = make_learners(*(build_network(name, 3) for name in names), base_lr=1e-3)
    batch = {key: torch.randn(2, 1, *shape) for key in ("x_a", "x_b", "u_a", "u_b")}
    batch |= {key: torch.randint(3, (2, *shape), dtype=torch.uint8) for key in ("y_a", "y_b")}
    mask = torch.ones(shape).bool()
    mask[:8] = False
    settings = method(dice="sample", pre_dice="whole", connectivity=8 if len(shape) == 2 else 26)
    losses = pretrain_step(learners, batch, mask, settings)
    add_teacher(learners)
    losses |= self_train_step(learners, batch, mask, settings)
    assert all(torch.isfinite(value) and not value.requires_grad for value in losses.values())


def test_loss_weights_come_from_the_settings():
    def loss(**changes):
        torch.manual_seed(0)
        students = (without_dropout(build_network(name, 2)) for name in ("unet", "resunet"))
        learners = make_learners(*students, base_lr=1e-3)
        add_teacher(learners)
        batch = next(iter(TinyStreams().batches(0, 1)))
        mask = torch.zeros(32, 32).bool()
        mask[8:] = True
        return {k: v.item() for k, v in self_train_step(learners, batch, mask, method(**changes)).items()}

    base, heavy = loss(mse_weight=0.0, kl_weight=0.0), loss(mse_weight=2.0, kl_weight=3.0)
    for role in ("student_a", "student_b"):
        added = 2 * heavy[f"{role}/mse"] + 3 * heavy[f"{role}/kl"]
        assert heavy[f"{role}/loss"] == pytest.approx(base[f"{role}/loss"] + added, rel=1e-5)
        assert base[f"{role}/loss"] == pytest.approx((base[f"{role}/dice"] + base[f"{role}/ce"]) / 2, rel=1e-5)
    assert loss(u_weight=0.0)["student_a/ce"] < base["student_a/ce"]


def test_validation_iterations_and_seeds():
    assert list(validation_iterations(5650, 565, 11_300)) == list(range(5650, 11_301, 565))
    assert list(validation_iterations(200, 200, 700)) == [200, 400, 600]
    assert list(validation_iterations(10, 0, 700)) == []
    seeds = {iteration_seed(s, stage, i) for s in (0, 1) for stage in ("pre_train", "self_train") for i in range(50)}
    assert len(seeds) == 200


@pytest.mark.parametrize(
    ("name", "words"), [("val", "validation cases"), ("test", "the TEST cases (the published selection)")]
)
def test_scores_are_named_by_what_they_are_from(tmp_path, name, words):
    common = {"validate": score, "validate_at": (), "validated_on": name, "config": {}}
    pretrain(tiny_learners(), TinyStreams(), tmp_path, method(pre_iterations=2), **common)
    assert f"Dice on {words}" in (tmp_path / "pre_train" / "log.txt").read_text()
    assert f"{name}_dice/mean" in (tmp_path / "pre_train" / "metrics.csv").read_text().splitlines()[0]


def test_another_configuration_does_not_go_on_with_a_checkpoint(tmp_path):
    common = {"validate": score, "validate_at": (), "validated_on": "val"}
    pretrain(tiny_learners(), TinyStreams(), tmp_path, method(pre_iterations=2), config={"base_lr": 1e-3}, **common)
    with pytest.raises(UserError, match="base_lr 0.001 there, 0.01 now"):
        pretrain(tiny_learners(), TinyStreams(), tmp_path, method(pre_iterations=4), config={"base_lr": 1e-2}, **common)


def test_the_learning_rate_is_this_runs(tmp_path):
    common = {"validate": score, "validate_at": (), "validated_on": "val", "config": {}}
    pretrain(tiny_learners(), TinyStreams(), tmp_path, method(pre_iterations=2), **common)
    learners = make_learners(build_network("unet", 2), build_network("unet", 2), base_lr=1e-5)
    settings = method(self_iterations=1)
    self_train(learners, TinyStreams(), tmp_path, settings, start_from="last", **common)
    assert {group["lr"] for o in learners.optimisers.values() for group in o.param_groups} == {1e-5}


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The loss of an iteration is computed before its step, so that it can be finite when the weights are not."""

    class Overflowing(TinyStreams):
        def batches(self, start, stop):
            for i, batch in enumerate(super().batches(start, stop), start=1):
                yield batch
                if i == 3:
                    next(learners.networks["student_a"].parameters()).data.fill_(math.inf)

    learners = tiny_learners()
    common = {"validate": None, "validate_at": (), "validated_on": "val", "config": {}}
    with pytest.raises(UserError, match="student_a.* became nan or infinite"):
        pretrain(learners, Overflowing(), tmp_path, method(pre_iterations=4, log_every=1, save_every=2), **common)
    assert checkpoints.load(tmp_path / "pre_train" / "last.pth")["iteration"] == 2


def both(folder, settings, stage_two=None, **changes):
    common = {"validate": score, "validate_at": (), "validated_on": "val", "config": {}, **changes}
    learners = tiny_learners()
    pretrain(learners, TinyStreams(), folder, settings, **common)
    self_train(learners, TinyStreams(), folder, stage_two or settings, start_from="best", **common)
    return learners


def test_self_training_goes_on_from_the_save_before_where_the_last_is_lost(tmp_path):
    """It does not begin again from stage 1, which may be gone by then."""
    both(tmp_path, method(pre_iterations=1, self_iterations=4, save_every=1))
    shutil.rmtree(tmp_path / "pre_train")
    (tmp_path / "self_train" / "last.pth").unlink()
    learners = tiny_learners()
    common = {"validate": score, "validate_at": (), "validated_on": "val", "config": {}}
    settings = method(pre_iterations=1, self_iterations=4, save_every=1)
    self_train(learners, TinyStreams(), tmp_path, settings, start_from="best", **common)
    assert learners.iteration == 4
    assert (
        "Going on from last_previous.pth, saved after iteration 3" in (tmp_path / "self_train" / "log.txt").read_text()
    )


def test_a_lost_best_of_stage_one_is_named_before_self_training(tmp_path):
    common = {"validate": score, "validate_at": (), "validated_on": "val", "config": {}}
    pretrain(tiny_learners(), TinyStreams(), tmp_path, method(pre_iterations=2), **common)
    (tmp_path / "pre_train" / "best_student_b.pth").unlink()
    with pytest.raises(UserError, match="best_student_b.pth is missing although the run selected it"):
        self_train(tiny_learners(), TinyStreams(), tmp_path, method(), start_from="best", **common)
    broken = tmp_path / "pre_train" / "best_student_b.pth"
    checkpoints.save({"networks": {"student_b": {}}, "optimisers": {"student_b": {}}}, broken)
    with pytest.raises(UserError, match="best_student_b.pth"):
        self_train(tiny_learners(), TinyStreams(), tmp_path, method(), start_from="best", **common)


def test_both_stages_are_validated_on_what_they_say_and_keep_a_picture(tmp_path, monkeypatch):
    from sdcl.runs.records import StageRecord

    pictures = []
    monkeypatch.setattr(
        StageRecord, "add_image", lambda self, name, image, step: pictures.append((name, image.shape, step))
    )
    both(tmp_path, method(pre_iterations=2, self_iterations=3), validated_on="test")
    assert pictures == [("test cases", PANEL.shape, 2), ("test cases", PANEL.shape, 3)]
    for stage in ("pre_train", "self_train"):
        assert "test_dice/mean" in (tmp_path / stage / "metrics.csv").read_text().splitlines()[0]


def test_without_a_picture_a_validation_is_a_validation(tmp_path):
    both(tmp_path, method(pre_iterations=1, self_iterations=1), validate=lambda p: Validation(score(p).dice, None))


def test_the_first_of_equal_scores_is_the_best_and_0_is_a_score(tmp_path):
    scores = iter([0.0, 0.5, 0.5])
    seen = []

    def validate(predictors):
        dice = next(scores)
        seen.append(dice)
        return Validation({"student_a": dice, "student_b": 0.0, "mean": dice}, PANEL)

    common = {"validate": validate, "validate_at": (1, 2, 3), "validated_on": "val", "config": {}}
    learners = tiny_learners()
    pretrain(learners, TinyStreams(), tmp_path, method(pre_iterations=3), **common)
    assert learners.best["mean"] == {"dice": 0.5, "iteration": 2}
    assert learners.best["student_b"] == {"dice": 0.0, "iteration": 1}
    assert checkpoints.load(tmp_path / "pre_train" / "best_mean.pth")["iteration"] == 2


class Clocked(TinyStreams):
    """A batch every 30 s, by a clock that stands still otherwise."""

    seconds = 0.0

    def batches(self, start, stop):
        for batch in super().batches(start, stop):
            self.seconds += 30
            yield batch


@pytest.mark.parametrize(("minutes", "saves"), [(0.0, [6]), (0.5, [1, 2, 3, 4, 5, 6]), (1.0, [2, 4, 6]), (1.1, [3, 6])])
def test_a_run_saves_when_so_many_minutes_have_passed(tmp_path, monkeypatch, minutes, saves):
    streams, saved = Clocked(), []
    monkeypatch.setattr("sdcl.training.time.perf_counter", lambda: streams.seconds)
    monkeypatch.setattr(checkpoints, "save", lambda payload, path, previous=None: saved.append(payload["iteration"]))
    (tmp_path / "pre_train").mkdir()
    (tmp_path / "pre_train" / "last.pth").write_bytes(b"x")
    monkeypatch.setattr(checkpoints, "load_last", lambda folder: None)
    settings = method(pre_iterations=6, save_every=100, save_minutes=minutes, log_every=100)
    pretrain(tiny_learners(), streams, tmp_path, settings, **UNSCORED)
    assert saved == saves


UNSCORED = {"validate": None, "validate_at": (), "validated_on": "val", "config": {}}


def test_each_reading_of_the_losses_is_logged_with_the_time_of_one_iteration(tmp_path, monkeypatch):
    streams = Clocked()
    monkeypatch.setattr("sdcl.training.time.perf_counter", lambda: streams.seconds)
    pretrain(tiny_learners(), streams, tmp_path, method(pre_iterations=4, save_every=100, log_every=2), **UNSCORED)
    lines = (tmp_path / "pre_train" / "log.txt").read_text().splitlines()
    told = [line for line in lines if ": loss " in line]
    for number, line in zip((2, 4), told, strict=True):
        expected = (
            rf"pre_train {number}: loss student_a [01]\.\d{{4}}, student_b [01]\.\d{{4}}; 30\.000 s an iteration$"
        )
        assert re.search(expected, line), line
    assert any("pre_train: 30.000 s an iteration (median of 4" in line for line in lines)


def test_a_signal_lets_the_iteration_finish_saves_and_ends_with_its_number(tmp_path):
    class Asking(TinyStreams):
        def batches(self, start, stop):
            for k, batch in enumerate(super().batches(start, stop), start=1):
                if k == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    settings = method(pre_iterations=5, save_every=100, log_every=100)
    with pytest.raises(SystemExit) as end:
        pretrain(tiny_learners(), Asking(), tmp_path, settings, **UNSCORED)
    assert end.value.code == 128 + signal.SIGTERM
    assert checkpoints.load(tmp_path / "pre_train" / "last.pth")["iteration"] == 2


def test_an_iterations_seed_is_of_seed_stage_and_number():
    for k, stage in enumerate(("pre_train", "self_train")):
        expected = np.random.SeedSequence([7, k, 3]).generate_state(1, np.uint64)[0]
        assert iteration_seed(7, stage, 3) == int(expected) // 2 < 2**63  # what torch.manual_seed takes


@pytest.mark.parametrize(("fraction", "box"), [(2 / 3, 21), (0.5, 16), (0, 0)])
def test_each_iteration_draws_the_mask_after_its_seed(tmp_path, monkeypatch, fraction, box):
    masks = []

    def step(learners, batch, mask, settings):
        masks.append(mask)
        return pretrain_step(learners, batch, mask, settings)

    ours = dataclasses.replace(get("sdcl"), pretrain_step=step)
    monkeypatch.setattr("sdcl.training.get", lambda name: ours)
    pretrain(tiny_learners(), TinyStreams(), tmp_path, method(pre_iterations=2, mask_fraction=fraction), **UNSCORED)
    for number, mask in enumerate(masks, start=1):
        assert mask.dtype == torch.bool and int((~mask).sum()) == box**2
        torch.manual_seed(iteration_seed(1, "pre_train", number))
        assert not fraction or torch.equal(mask, copy_paste_mask((32, 32), (box, box)))


@pytest.mark.parametrize("dropout", ["yes", "no"])
def test_the_teacher_alone_may_go_without_dropout(tmp_path, dropout):
    learners, settings = tiny_learners(), method(pre_iterations=1, self_iterations=2, teacher_dropout=dropout)
    pretrain(learners, TinyStreams(), tmp_path, settings, **UNSCORED)
    self_train(learners, TinyStreams(), tmp_path, settings, start_from="last", **UNSCORED)
    for role, network in learners.networks.items():
        modes = {m.training for m in network.modules() if isinstance(m, nn.Dropout)}
        assert modes == {role != "teacher" or dropout == "yes"} and network.training, role


def test_compiling_is_of_the_stages_networks(tmp_path):
    learners = tiny_learners()
    with mock.patch("sdcl.training.compile_networks") as compiled:
        pretrain(learners, TinyStreams(), tmp_path, method(pre_iterations=1, compile=True), **UNSCORED)
    ((networks, device), _), = compiled.call_args_list  # fmt: skip
    assert list(networks) == list(learners.networks.values()) and device == torch.device("cpu")


@pytest.mark.parametrize("seconds", [0.0, 0.4])
def test_a_run_that_waits_for_its_batches_says_so(tmp_path, monkeypatch, seconds):
    class SlowStreams(TinyStreams):
        def batches(self, start, stop):
            for batch in super().batches(start, stop):
                time.sleep(seconds)
                yield batch

    monkeypatch.setattr("sdcl.training.WATCHED", 7)
    pretrain(tiny_learners(), SlowStreams(), tmp_path, method(pre_iterations=8), **UNSCORED)
    log = (tmp_path / "pre_train" / "log.txt").read_text()
    told = re.findall(r"pre_train waits for batches for (\d+) % of its time: more --workers", log)
    assert len(told) == bool(seconds) and all(20 < int(share) <= 100 for share in told)


def test_a_stage_tells_its_cost(tmp_path):
    common = {"validate": None, "validate_at": (), "validated_on": "val", "config": {}}
    pretrain(tiny_learners(), TinyStreams(), tmp_path, method(pre_iterations=3, log_every=1), **common)
    found = re.search(
        r"pre_train: ([\d.]+) s an iteration \(median of 3, validation apart\), peak memory ([\d.]+) GiB",
        (tmp_path / "pre_train" / "log.txt").read_text(),
    )
    assert float(found[1]) > 0 and 0.05 < float(found[2]) < 100


def test_validations_end_with_the_stage():
    assert list(validation_iterations(0, 5, 9)) == [5] and list(validation_iterations(0, 5, 10)) == [5, 10]
    assert list(validation_iterations(0, 0, 10)) == []
