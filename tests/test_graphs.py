"""When passes are recorded and replayed; test_cuda.py has the graphs themselves, which need a GPU."""

import contextlib

import numpy as np
import pytest
import torch
from helpers import method
from torch import nn

from sdcl import graphs
from sdcl.checkpoints import load_last
from sdcl.graphs import MOST, is_recorded, recorded
from sdcl.methods import get
from sdcl.networks import build_network, resnet, unet
from sdcl.runs.errors import UserError
from sdcl.scoring.evaluation import Validation
from sdcl.training import make_learners, pretrain, self_train


class Replayed:
    """In the place of a graph: a pass that computes what a graph would, in memory of its own."""

    made = forwards = backwards = 0

    def __init__(self, of, image, learning):
        Replayed.made += 1
        self.of, self.learning = of, learning

    def forward(self, image):
        Replayed.forwards += 1
        with torch.set_grad_enabled(bool(self.learning)):
            self.logits = self.of.as_it_is(image)
        return self.logits.detach().clone()

    def backward(self, gradient):
        Replayed.backwards += 1
        found = torch.autograd.grad(self.logits, self.learning, gradient)
        for parameter, one in zip(self.learning, found, strict=True):
            parameter.grad += one


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(graphs, "_Pass", Replayed)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    Replayed.made = Replayed.forwards = Replayed.backwards = 0


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.0), nn.ReLU(), nn.Conv2d(3, 2, 1))


def images(count, side=8):
    return torch.randn(count, 2, 1, side, side).unbind()


def test_replayed_passes_add_the_same_gradients():
    pictures, found = images(3), []
    for is_on in (False, True):
        net = network()
        with recorded([net] if is_on else []):
            assert is_recorded(net) == is_on
            for image in pictures:
                net(image).square().sum().backward()
        assert not is_recorded(net)
        found.append([p.grad for p in net.parameters()] + list(net.buffers()))
    assert (Replayed.made, Replayed.forwards, Replayed.backwards) == (1, 3, 3)
    torch.testing.assert_close(*found)


def test_evaluation_runs_as_it_is():
    net = network().eval()
    with recorded([net]), torch.no_grad():
        net(*images(1))
    assert Replayed.made == 0


def test_a_pass_runs_as_it_is_while_another_has_yet_to_go_backward():
    first, second = images(2)
    net, wanted = network(), network()
    (wanted(first).sum() + wanted(second).sum()).backward()
    with recorded([net]):
        one, other = net(first), net(second)  # the second must not overwrite what the first has left
        (one.sum() + other.sum()).backward()
        net(first).sum().backward()  # and then they are replayed again
    wanted(first).sum().backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in wanted.parameters()])
    assert Replayed.made == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net[1], "momentum", 0.0),
        lambda net: setattr(net[2], "p", 0.5),
        lambda net: net[2].eval(),
        lambda net: setattr(net[0].weight, "data", net[0].weight.data.clone()),
        lambda net: setattr(net[0].weight, "grad", None),
        lambda net: net[0].bias.requires_grad_(False),
        lambda net: net.zero_grad(set_to_none=False),
    ],
    ids=["momentum", "dropout", "mode", "weights elsewhere", "gradient elsewhere", "frozen", "nothing"],
)
def test_what_a_recording_fixes_makes_another_when_it_changes(change, request):
    net = network()
    with recorded([net]):
        for _ in range(2):
            net(*images(1)).sum().backward()
            kept = [p.grad for p in net.parameters()]  # so that memory is not found again by chance
            change(net)
    assert len(kept) == 6 and Replayed.made == 1 + ("nothing" not in request.node.name)


def test_the_teachers_pass_is_another_than_one_that_learns():
    net = network()
    with recorded([net]):
        with torch.no_grad():
            assert not net(*images(1)).requires_grad
        net(*images(1)).sum().backward()
    assert Replayed.made == 2


def test_so_many_kinds_are_recorded_and_no_more():
    net = network()
    with recorded([net]):
        for side in (6, 7, 8, 9, 10, 11, 10, 6):
            net(*images(1, side)).sum().backward()
    assert Replayed.made == MOST


def test_a_frozen_parameter_gets_no_gradient_and_one_that_is_freed_again_does():
    net = network()
    with recorded([net]):
        for learns in (True, False, True):
            net[0].bias.requires_grad_(learns)
            net.zero_grad(set_to_none=True)
            net(*images(1)).sum().backward()
            assert (net[0].bias.grad is not None) == learns and net[0].weight.grad.any()


def test_a_gradient_towards_the_input_arrives():
    before, net = nn.Conv2d(1, 1, 1), network()
    with recorded([net]):
        net(before(*images(1))).square().sum().backward()
    assert before.weight.grad.any() and Replayed.made == 0


def test_a_replayed_pass_goes_backward_once():
    net = network()
    with recorded([net]):
        logits = net(*images(1))
        logits.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="goes backward once"):
            logits.mean().backward()


def test_a_pass_that_nobody_kept_does_not_stop_the_replaying():
    net = network()
    with recorded([net]):
        for _ in range(3):
            net(*images(1))
    assert Replayed.forwards == 3


def test_a_recording_that_fails_names_the_way_out(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: operation not permitted\nmore of it")

    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(graphs._Pass, "_try", lambda *_: None)
    monkeypatch.setattr(graphs._Pass, "_record", fail)
    net = network()
    with pytest.raises(UserError, match=r"no graph \(CUDA error: operation not permitted\): give --no_cuda_graphs\.$"):
        with recorded([net]):
            net(*images(1))
    assert not is_recorded(net)


class TinyStreams:
    def names(self, iteration):
        return {"x_a": ["one"]}

    def batches(self, start, stop):
        for k in range(start, stop):
            generator = torch.Generator().manual_seed(k)
            batch = {name: torch.randn(2, 1, 32, 32, generator=generator) for name in ("x_a", "x_b", "u_a", "u_b")}
            yield batch | {f"y_{d}": (batch[f"x_{d}"][:, 0] > 0).to(torch.uint8) for d in "ab"}


def validate(predictors):
    with torch.no_grad():
        values = [float(net.eval()(torch.ones(1, 1, 32, 32)).sum() % 1) for net in predictors.networks]
    dice = {name: sum(values[i] for i in members) / len(members) for name, members in predictors.members.items()}
    return Validation(dice, np.zeros((3, 4, 4)))


@pytest.mark.parametrize(("name", "kinds"), [("sdcl", 3), ("bcp", 2), ("cps", 2), ("ua_mt", 3), ("supervised", 1)])
def test_whole_trainings_are_the_same_to_the_bit(name, kinds, tmp_path, monkeypatch):
    """Both stages, dropout on, averages kept, validated in between, gone on with after a stop."""
    for module in (resnet, unet):
        monkeypatch.setattr(module, "WIDTHS", (2, 4, 8, 16, 32))
    found, made = [], []
    for is_on in (False, True):
        monkeypatch.setattr("sdcl.training.records_passes", lambda settings, device, is_on=is_on: is_on)
        folder = tmp_path / str(is_on)
        for iterations in (2, 5):  # the second time it goes on
            torch.manual_seed(0)
            learners = make_learners(build_network("unet", 2), build_network("resunet", 2), base_lr=1e-3)
            settings = method(method=name, pre_iterations=3, self_iterations=iterations, average_decay=0.5, rampup=2)
            common = {"validate": validate, "validate_at": (1, 4), "validated_on": "val", "config": {}}
            pretrain(learners, TinyStreams(), folder, settings, **common)
            before = Replayed.made
            self_train(learners, TinyStreams(), folder, settings, start_from="best", **common)
            made.append(Replayed.made - before)
        state = load_last(folder / "self_train").payload
        found.append([v for network in state["networks"].values() for v in network.values()] + [state["best"]])
    *tensors, best = zip(*found, strict=True)
    assert len(tensors) > 100 and all(torch.equal(a, b) for a, b in tensors) and best[0] == best[1]
    assert made == [0, 0, kinds, kinds] and Replayed.backwards > 0
    assert set(get(name).students) <= set(state["networks"])
