"""The steps against the textbook's in float64, where nothing hides in the rounding; what they must not wait for."""

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import textbook
import torch
from helpers import method
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sdcl import steps
from sdcl.losses import class_map
from sdcl.methods import get
from sdcl.methods.sdcl import self_train_step
from sdcl.networks import build_network, resnet, unet, vnet
from sdcl.pseudo_labels import PendingLabels, largest_components
from sdcl.runs.devices import place
from sdcl.runs.errors import UserError
from sdcl.steps import STUDENTS, add_teacher, make_learners, pretrain_step

PAIRS = {
    "2d": (("unet", "resunet"), (32, 48), method()),
    "3d": (
        ("vnet", "resvnet"),
        (32, 32, 16),
        method(dice="sample", pre_dice="whole", pseudo_label_rule="threshold", connectivity=26, ema_buffers=False),
    ),
}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """The same networks with few filters: float64 convolutions are slow."""
    for module in (resnet, unet, vnet):
        monkeypatch.setattr(module, "WIDTHS", (2, 4, 8, 16, 32))


def learners_of(names):
    """Both students in train mode without dropout, in float64, and the teacher."""
    torch.manual_seed(0)
    students = (place(build_network(name, 2).double(), torch.device("cpu")) for name in names)
    learners = make_learners(*students, base_lr=1e-3)
    add_teacher(learners)
    for network in learners.networks.values():
        network.train()
        for module in network.modules():
            if isinstance(module, nn.Dropout | nn.Dropout3d):
                module.p = 0.0
    return learners


def batch_of(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    batch = {key: torch.randn(2, 1, *shape, generator=generator).to(dtype) for key in ("x_a", "x_b", "u_a", "u_b")}
    labels = {key: torch.randint(2, (2, *shape), generator=generator, dtype=torch.uint8) for key in ("y_a", "y_b")}
    mask = torch.ones(shape).bool()
    mask[tuple(slice(seed, seed + 10) for _ in shape)] = False
    return batch | labels, mask


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("stage", ["pre_train", "self_train"])
def test_three_steps_are_the_textbooks(pair, stage):
    names, shape, settings = PAIRS[pair]
    learners = learners_of(names)
    theirs = copy.deepcopy(learners.networks)
    teacher, students = theirs["teacher"], {role: theirs[role] for role in STUDENTS}
    optimisers = {role: torch.optim.Adam(s.parameters(), lr=1e-3, foreach=False) for role, s in students.items()}
    for seed in range(3):
        batch, mask = batch_of(shape, seed)
        if stage == "pre_train":
            losses = pretrain_step(learners, batch, mask, settings)
            expected = textbook.pretrain_step(students, optimisers, batch, mask, settings)
        else:
            losses = self_train_step(learners, batch, mask, settings)
            expected = textbook.self_train_step(students, teacher, optimisers, batch, mask, settings)
            assert losses["discrepancy"] > 0
        for name, value in expected.items():
            assert losses[name].item() == pytest.approx(value, rel=1e-9)
    for role, network in theirs.items():
        ours = learners.networks[role].state_dict()
        for name, value in network.state_dict().items():
            if value.ndim > 1:  # a bias before a norm has the gradient 0, and Adam divides its rounding by itself
                torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-7, msg=f"{role} {name}")


def test_a_checkpoint_goes_on_in_another_memory_layout(tmp_path):
    names, shape, settings = PAIRS["2d"]
    ours, others = learners_of(names), learners_of(names)
    for network in others.networks.values():
        network.to(memory_format=torch.contiguous_format)
    self_train_step(ours, *batch_of(shape, 0), settings)
    others.load(copy.deepcopy(ours.state()), tmp_path)
    for learners in (ours, others):
        self_train_step(learners, *batch_of(shape, 1), settings)
    for role, network in ours.networks.items():
        weights = others.networks[role].state_dict()
        for name, value in network.state_dict().items():
            if value.ndim > 1:
                torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-7, msg=f"{role} {name}")


# What makes the calling thread wait for a GPU: by Python's name, and by the operation that any other way comes down to.
WAITING_CALLS = {"item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__"}
WAITING_OPERATIONS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount"}


class Waits(TorchDispatchMode):
    """Collects the names of what this thread calls that waits for the device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in WAITING_OPERATIONS:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """The same for what stays in Python, such as numpy() of a tensor."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in WAITING_CALLS:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def waits_of(function, *arguments):
    with Waits() as waits, Calls() as calls:
        function(*arguments)
    return waits.names + calls.names


@pytest.mark.parametrize("pair", PAIRS)
def test_no_step_waits_for_the_device(pair):
    names, shape, settings = PAIRS[pair]
    learners = learners_of(names)
    batch, mask = batch_of(shape, 0)
    pretrain_step(learners, batch, mask, settings)  # Adam's first step makes its state
    assert waits_of(pretrain_step, learners, batch, mask, settings) == []
    assert waits_of(self_train_step, learners, batch, mask, settings) == []


def test_the_count_of_waits_sees_the_textbooks():
    names, shape, settings = PAIRS["2d"]
    learners = learners_of(names)
    batch, mask = batch_of(shape, 0)
    teacher, students = learners.networks["teacher"], {role: learners.networks[role] for role in STUDENTS}
    optimisers = {role: torch.optim.Adam(s.parameters(), foreach=False) for role, s in students.items()}
    waits = waits_of(textbook.self_train_step, students, teacher, optimisers, batch, mask, settings)
    assert {"item", "cpu", "numpy", "aten::_local_scalar_dense"} <= set(waits)


def test_pseudo_labels_come_while_others_wait():
    """The caller goes on at once, and has the labels that it would have had by waiting."""
    logits = torch.randn(3, 4, 24, 20)
    pending = [PendingLabels(logits, "argmax", 8) for _ in range(4)]
    expected = torch.from_numpy(np.stack([largest_components(x, 8) for x in class_map(logits).numpy()]))
    assert all(torch.equal(labels.result(), expected) for labels in pending)
    with pytest.raises(ValueError, match="connectivity 26"):
        PendingLabels(logits, "argmax", 26).result()


def test_gradients_of_a_step_are_one_sum_over_both_mixes():
    """Each parameter's gradient after a step is that of both mixes, and the next step begins anew."""
    names, shape, settings = PAIRS["2d"]
    learners = learners_of(names)
    for optimiser in learners.optimisers.values():
        optimiser.param_groups[0]["lr"] = 0.0
    teacher = copy.deepcopy(learners.networks["teacher"])
    batch, mask = batch_of(shape, 0)
    gradients = []
    for _ in range(2):
        learners.networks["teacher"].load_state_dict(teacher.state_dict())
        self_train_step(learners, batch, mask, settings)
        gradients.append([p.grad.clone() for p in learners.networks["student_a"].parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["sdcl", "cps", "mean_teacher", "supervised"])
def test_gradients_set_aside_between_passes_are_the_same_bits(name, monkeypatch):
    """As other devices than a CPU do, in few launches; losses, norms and all that moves."""
    found = []
    for adds_in_place in (lambda student: False, steps.adds_in_place):
        monkeypatch.setattr(steps, "adds_in_place", adds_in_place)
        learners = learners_of(PAIRS["2d"][0])
        learners.keep(get(name).roles)
        for seed in range(2):
            torch.manual_seed(seed)
            losses = get(name).self_train_step(learners, *batch_of((32, 48), seed), method(method=name))
        found.append([*losses.values(), *(p for n in learners.networks.values() for p in n.state_dict().values())])
        assert not learners.aside and all(p.grad is not None for p in learners.students[0].parameters())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_step_of_ones_own_finds_whole_gradients_after_the_labelled_images(monkeypatch):
    """Such as one that clips them, on any device."""
    monkeypatch.setattr(steps, "adds_in_place", lambda student: False)
    learners = learners_of(PAIRS["2d"][0])
    steps.clear_gradients(learners)
    batch, _ = batch_of((32, 48), 0)
    named = steps.supervised_step(learners, batch, method())
    parameters = list(learners.networks["student_a"].parameters())
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1e-3)
    assert norm > 0.01 and steps.descend(learners, named)["student_a/grad_norm"] == pytest.approx(1e-3, rel=1e-2)


def test_gradients_keep_their_place_in_memory():
    """They are zeroed, not freed, so that activations find the same memory at each step; the teacher has none."""
    names, shape, settings = PAIRS["2d"]
    learners = learners_of(names)
    parameters = [p for student in learners.students for p in student.parameters()]
    places = [p.grad.data_ptr() for p in parameters]
    for seed in range(2):
        self_train_step(learners, *batch_of(shape, seed), settings)
    assert [p.grad.data_ptr() for p in parameters] == places
    assert all(p.grad is None for p in learners.networks["teacher"].parameters())


def test_a_frozen_parameter_stays():
    """Also where Adam has moments that would move it on."""
    names, shape, settings = PAIRS["2d"]
    learners = learners_of(names)
    self_train_step(learners, *batch_of(shape, 0), settings)
    frozen, moving = list(learners.networks["student_b"].parameters())[:2]
    frozen.requires_grad_(False)
    before = frozen.clone(), moving.detach().clone()
    self_train_step(learners, *batch_of(shape, 1), settings)
    assert torch.equal(frozen, before[0]) and not torch.equal(moving, before[1])


def state_of(learners):
    return {f"{role}.{n}": v.clone() for role, net in learners.networks.items() for n, v in net.named_parameters()}


@pytest.mark.parametrize("stage", ["pre_train", "self_train"])
def test_nothing_moves_from_a_value_that_is_not_finite_on(stage):
    names, shape, settings = PAIRS["2d"]
    learners, step = learners_of(names), {"pre_train": pretrain_step, "self_train": self_train_step}[stage]
    batch, mask = batch_of(shape, 0)
    step(learners, batch, mask, settings)
    before, adam = state_of(learners), learners.optimisers["student_a"].state_dict()["state"][0]["step"].clone()
    bad = batch | {"x_a": torch.full_like(batch["x_a"], torch.inf)}
    losses = [step(learners, each, mask, settings) for each in (bad, batch)]
    assert not torch.isfinite(losses[0]["student_a/grad_norm"]) and learners.halted == 1
    assert all(torch.equal(before[name], value) for name, value in state_of(learners).items())
    assert learners.optimisers["student_a"].state_dict()["state"][0]["step"] == adam
    assert all(bool(torch.isfinite(v).all()) for v in learners.networks["teacher"].state_dict().values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_network_computes_in_the_runs_precision(precision):
    names, shape, settings = PAIRS["2d"]
    learners = learners_of(names)
    types = {}
    for role, network in learners.networks.items():
        network.float()
        network.register_forward_hook(lambda _, __, out, role=role: types.setdefault(role, []).append(out.dtype))
    settings = SimpleNamespace(**(vars(settings) | {"precision": precision}))
    batch, mask = batch_of(shape, 0, torch.float32)
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    pretrain_step(learners, batch, mask, settings)
    assert types == {role: [expected] for role in STUDENTS}
    losses = self_train_step(learners, batch, mask, settings)
    assert types == {"student_a": [expected] * 3, "student_b": [expected] * 3, "teacher": [expected] * 2}
    assert all(losses[f"{role}/{part}"].dtype == torch.float32 for role in STUDENTS for part in ("dice", "ce", "mse"))


def test_the_teachers_statistics_follow_the_students_where_the_settings_say_so():
    names, shape, settings = PAIRS["2d"]
    means = {}
    for averaged in (False, True):
        learners = learners_of(names)
        self_train_step(learners, *batch_of(shape, 0), SimpleNamespace(**(vars(settings) | {"ema_buffers": averaged})))
        states = [learners.networks[role].state_dict() for role in ("teacher", "student_a")]
        name = next(name for name in states[0] if name.endswith("running_mean"))
        means[averaged] = [state[name] for state in states]
    own, student = means[False]
    torch.testing.assert_close(means[True][0], 0.99 * own + 0.01 * student)
    assert not torch.allclose(own, student)


@pytest.mark.parametrize("part", ["networks", "optimisers"])
@pytest.mark.parametrize("held", [None, {}, ["student_a"], {"student_c": {}}])
def test_a_state_that_is_not_by_role_is_refused(part, held):
    learners = learners_of(PAIRS["2d"][0])
    with pytest.raises(UserError, match="last.pth is not a checkpoint of a run: choose one"):
        learners.load(learners.state() | {part: held}, Path("last.pth"))


def test_an_optimiser_that_does_not_fit_is_refused_by_its_file():
    learners = learners_of(PAIRS["2d"][0])
    state = learners.state()
    state["optimisers"]["student_b"] = {"state": {0: {}}, "param_groups": []}
    with pytest.raises(UserError, match="last.pth"):
        learners.load(state, Path("last.pth"))
