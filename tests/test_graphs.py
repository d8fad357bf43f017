"""When passes are recorded and replayed; test_cuda.py has the graphs themselves, which need a GPU."""

import pytest
import torch
from torch import nn

from sdcl import graphs
from sdcl.graphs import MOST, is_recorded, recorded
from sdcl.runs.errors import UserError


class Replayed:
    """In the place of a graph: a pass that computes what a graph would, in memory of its own."""

    made = 0

    def __init__(self, of, image, learns):
        Replayed.made += 1
        self.of = of

    def forward(self, image):
        with torch.enable_grad():
            self.logits = self.of.to_record(image)
        return self.logits.detach().clone()

    def backward(self, gradient):
        for p, g in zip(
            self.of.parameters, torch.autograd.grad(self.logits, self.of.parameters, gradient), strict=True
        ):
            p.grad += g


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(graphs, "_Pass", Replayed)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    Replayed.made = 0


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
    assert Replayed.made == 1
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
        lambda net: net.zero_grad(set_to_none=False),
    ],
    ids=["momentum", "dropout", "mode", "weights elsewhere", "gradient elsewhere", "nothing"],
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


def test_a_recording_that_fails_names_the_way_out(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: operation not permitted\nmore of it")

    monkeypatch.setattr(graphs, "_Pass", fail)
    net = network()
    with pytest.raises(UserError, match=r"no graph \(CUDA error: operation not permitted\): give --no_cuda_graphs\.$"):
        with recorded([net]):
            net(*images(1))
    assert not is_recorded(net)
