import json

import numpy as np
import pytest
import torch
from helpers import GOLDEN, fill, strided
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sdcl.networks import NETWORKS, build_network, layers
from sdcl.networks.layers import BatchNorm, Dropout, every_second
from sdcl.networks.lowres import LowRes
from sdcl.networks.resnet import BasicBlock
from sdcl.networks.unet import UpBlock
from sdcl.networks.vnet import Head

FIGURES = json.loads((GOLDEN / "networks.json").read_text())
CLASSES = {"unet": 4, "resunet": 4, "vnet": 2, "resvnet": 2}
PARAMETERS = {"unet": 1_813_764, "resunet": 5_953_092, "vnet": 9_443_266, "resvnet": 17_920_018}


@pytest.mark.parametrize("name", CLASSES)
def test_names_and_shapes_are_the_published_ones(name):
    state = build_network(name, CLASSES[name]).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == FIGURES[name]["used"]
    assert list(state) == list(FIGURES[name]["used"])


@pytest.mark.parametrize("name", CLASSES)
def test_every_parameter_takes_part(name):
    network = build_network(name, CLASSES[name])
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]
    image = torch.randn(2, 1, *([32, 16, 16] if "vnet" in name else [32, 16]))
    network(image).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("name", ["unet", "vnet"])
def test_output_is_the_golden_one(name):
    figures = FIGURES[name]
    network = fill(build_network(name, CLASSES[name]), 0).eval()
    image = np.random.RandomState(figures["eval_input"]["seed"]).standard_normal(figures["eval_input"]["shape"])
    with torch.no_grad():
        output = network(torch.from_numpy(image.astype(np.float32))).numpy()
    expected = figures["eval_output"]
    assert list(output.shape) == expected["shape"]
    tolerance = 1e-4 * expected["std"]
    np.testing.assert_allclose(strided(output, 64), expected["sample"], atol=tolerance)
    np.testing.assert_allclose([output.mean(), output.std()], [expected["mean"], expected["std"]], atol=tolerance)


@pytest.mark.parametrize(("name", "shape"), [("unet", (16, 48)), ("resunet", (48, 16)), ("vnet", (16, 32, 16)), ("resvnet", (32, 16, 16))])  # fmt: skip # noqa: E501
@pytest.mark.parametrize("classes", [2, 5])
def test_any_multiple_of_16_classes_and_channels(name, shape, classes):
    network = build_network(name, classes, in_channels=3).eval()
    with torch.no_grad():
        assert network(torch.randn(1, 3, *shape)).shape == (1, classes, *shape)


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - set(CLASSES)))
def test_networks_at_half_the_resolution(name):
    """Of means of 2x2x2 voxels, as many parameters, each of which takes part; the logits lie where the image does."""
    network, full = build_network(name, 2, dropout=0).double(), name.removesuffix("_lowres")
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[full]
    image = torch.randn(1, 1, 64, 32, 32).double()
    logits = network(image)
    assert logits.shape == (1, 2, 64, 32, 32)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    shuffled = image.clone()
    shuffled[0, 0, :2, :2, :2] = image[0, 0, :2, :2, :2].flip(0, 1, 2)
    torch.testing.assert_close(network(shuffled), logits, atol=1e-8, rtol=1e-8)
    at_full = build_network(full, 2, dropout=0).double()
    assert not torch.allclose(at_full(shuffled), at_full(image), atol=1e-4)


def test_what_is_interpolated_lies_where_it_was():
    ramp = torch.arange(8.0)[:, None, None] + torch.arange(0, 40, 10.0)[:, None] + torch.arange(0, 600, 100.0)
    inner = (..., *(slice(1, -1),) * 3)
    torch.testing.assert_close(LowRes(nn.Identity())(ramp[None, None])[inner], ramp[None, None][inner])


def test_dropout_is_where_the_method_has_it():
    """Without it two passes in train mode agree; the ResNet students drop only in the 3D head, not in 2D."""
    for name, drops in (("unet", True), ("resunet", False), ("vnet", True), ("resvnet", True)):
        torch.manual_seed(0)
        network = build_network(name, 2).train()
        image = torch.randn(2, 1, *([32, 16, 16] if "vnet" in name else [32, 32]))
        with torch.no_grad():
            assert (not torch.equal(network(image), network(image))) == drops, name


@pytest.mark.parametrize("name", NETWORKS)
def test_no_network_has_a_strided_convolution_of_width_1(name):
    """oneDNN writes past its memory there, on a processor with AVX2 alone and fewer than 8 input channels."""
    convolutions = [m for m in build_network(name, 3, 2).modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    assert convolutions
    assert not [m for m in convolutions if set(m.kernel_size) == {1} and set(m.stride) != {1}]


@pytest.mark.parametrize(("conv", "shape"), [(nn.Conv2d, (2, 5, 9, 8)), (nn.Conv3d, (2, 5, 7, 6, 5))])
@pytest.mark.parametrize("width", [8, 16])
def test_a_shortcut_is_the_strided_convolution(conv, shape, width):
    """Value and gradients, at odd sizes too; `conv` itself is run in float64, where no oneDNN kernel exists."""
    torch.manual_seed(0)
    block = BasicBlock(conv, lambda _: nn.Identity(), shape[1], width, stride=2).double()
    strided = conv(shape[1], width, 1, stride=2, bias=False).double()
    strided.load_state_dict({"weight": block.downsample[0].weight})
    x, y = (torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    ours, theirs = block.downsample(every_second(x.requires_grad_())), strided(y.requires_grad_())
    pull = torch.randn(ours.shape, dtype=torch.float64)
    for output in (ours, theirs):
        output.backward(pull)
    assert torch.equal(ours, theirs)
    assert torch.equal(x.grad, y.grad)
    torch.testing.assert_close(block.downsample[0].weight.grad, strided.weight.grad, rtol=1e-12, atol=1e-12)


def test_unknown_name_and_counts_are_refused():
    with pytest.raises(ValueError, match="unknown network 'segnet': choose one of vnet"):
        build_network("segnet", 2)
    with pytest.raises(ValueError, match="num_classes 1"):
        build_network("unet", 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.5])
def test_dropout_drops_a_share_and_scales_the_rest(dtype, p):
    torch.manual_seed(0)
    x = torch.randn(3, 7, 99, 51).to(dtype).to(memory_format=torch.channels_last).requires_grad_()  # no multiple of 4
    y = Dropout(p).train()(x)
    kept = y != 0
    share, n = kept.double().mean().item(), x.numel()
    assert abs(share - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5 + 2**-16
    rounding = 3 * torch.finfo(dtype).eps + 2**-14
    torch.testing.assert_close(y[kept].double(), x[kept].double() / (1 - p), rtol=rounding, atol=0)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(gradient != 0, kept) and gradient[kept].unique().numel() == 1
    expected = torch.tensor(1 / (1 - p), dtype=torch.float64)
    torch.testing.assert_close(gradient[kept][0].double(), expected, rtol=rounding, atol=0)


def test_dropout_draws_each_element_on_its_own():
    """Neighbours, four of which come of one random number, agree as often as independent ones do."""
    torch.manual_seed(0)
    kept = Dropout(0.5).train()(torch.ones(2**20)) != 0
    for apart in (1, 2, 3, 4, 8):
        agreement = (kept[apart:] == kept[:-apart]).double().mean().item()
        assert abs(agreement - 0.5) < 5 * 0.5 / 2**10
    torch.manual_seed(0)
    assert torch.equal(kept, Dropout(0.5).train()(torch.ones(2**20)) != 0)
    x = torch.randn(9)
    assert torch.equal(Dropout(0.5).eval()(x), x) and torch.equal(Dropout(0.0).train()(x), x)
    assert Dropout(1.0).train()(x).count_nonzero() == 0
    assert Dropout(0.999999).train()(x).shape == x.shape and Dropout(0.5).train()(x[:0]).shape == (0,)
    assert (Dropout(0.5).train()(torch.ones(8, 6)[:, ::2]) % 2 == 0).all()  # an input with gaps


@pytest.mark.parametrize("shape", [(3, 5, 6, 7), (2, 300, 4, 4), (1, 16, 4, 4)])
def test_batch_norm_is_pytorchs(shape):
    """Output, gradients and running statistics in float64, in both modes."""
    theirs, ours = (layer(shape[1]).double() for layer in (nn.BatchNorm2d, BatchNorm))
    x = torch.randn(shape).double().contiguous(memory_format=torch.channels_last).requires_grad_()
    for layer in (theirs, ours):
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
        nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(1))
    grad = torch.randn(shape).double().contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        results = [(y := layer(x), *torch.autograd.grad(y, [x, *layer.parameters()], grad)) for layer in (theirs, ours)]
        torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_adds_up_many_pixels_exactly(dtype):
    """PyTorch's own variance in float32 is 1.5e-4 off here, or more with a single thread."""
    x = (torch.randn(12, 16, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 + 1).to(dtype)
    layer = BatchNorm(16)
    layer.momentum = 1.0
    y = layer(x.contiguous(memory_format=torch.channels_last))
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    exact = x.double()
    torch.testing.assert_close(layer.running_mean.double(), exact.mean((0, 2, 3)), rtol=2e-6, atol=0)
    torch.testing.assert_close(layer.running_var.double(), exact.var((0, 2, 3)), rtol=5e-6, atol=0)
    expected = (exact - exact.mean((0, 2, 3), True)) / exact.std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5 + torch.finfo(dtype).eps, atol=1e-5)


def test_batch_norm_refuses_one_value_a_channel():
    with pytest.raises(ValueError, match="more than 1 value"):
        BatchNorm(2)(torch.ones(1, 2, 1, 1))


def test_the_doublings_gradient_is_the_numerical_one():
    block = UpBlock(4, 2).double().to(memory_format=torch.channels_last).eval()
    x, skip = torch.randn(2, 4, 3, 2).double(), torch.randn(2, 2, 6, 4).double()
    inputs = [t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, skip)]
    torch.autograd.gradcheck(block, inputs)

    class Gaps(TorchDispatchMode):
        """Tells of each gradient that goes back through a doubling whether it is a view with gaps."""

        found: list[bool] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name() == "aten::upsample_bilinear2d_backward":
                self.found.append(not args[0].is_contiguous(memory_format=torch.channels_last))
            return func(*args, **(kwargs or {}))

    with Gaps() as gaps:
        block(*inputs).square().sum().backward()
    assert gaps.found == [False]


def test_the_heads_dropout_may_come_before_its_relu():
    """The same output and gradients as stage, Dropout3d, convolution in the published order, for the same draws."""
    head, x = Head(6, 2).double().train(), torch.randn(2, 6, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    stage, dropout, to_classes = head
    results = []
    for run in (head, lambda x: to_classes(nn.functional.dropout3d(stage(x), dropout.p))):
        torch.manual_seed(0)
        y = run(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *head.parameters()])])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(results[0][0], head.eval()(x))  # something was dropped


@pytest.mark.parametrize("side", [16, 32, 48])
@pytest.mark.parametrize("name", CLASSES)
def test_the_gradient_of_every_convolution_in_bfloat16_is_the_gradient(name, side):
    """oneDNN reads memory that nobody wrote for some shapes: it is filled with nan here, and all shapes are seen."""
    torch.manual_seed(0)
    network = build_network(name, 2)
    seen = {}
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose3d):
            module.register_forward_hook(lambda m, given, _: seen.setdefault((repr(m), given[0].shape), m) and None)
    is_3d = "vnet" in name
    for patch in [(side, 16, 16), (side, 32, 16), (side, 16, 48)] if is_3d else [(side, 16), (side, 32), (side, 48)]:
        with torch.no_grad():
            network(torch.randn(2, 1, *patch))
    assert len(seen) > 10
    layout = torch.contiguous_format if is_3d else torch.channels_last
    wrong = []
    for (text, shape), module in seen.items():
        x = torch.randn(shape).to(memory_format=layout)
        pull = torch.randn(module(x).shape)
        gradients = []
        for enabled in (False, True):
            module.zero_grad()
            rubbish = [torch.full((module.weight.numel() * k,), torch.nan) for k in (1, 2, 4)]
            del rubbish
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                output = module(x)
            output.float().backward(pull)
            gradients.append(module.weight.grad.clone())
        if not (gradients[1] - gradients[0]).norm() < 0.03 * gradients[0].norm():
            wrong.append((text, tuple(shape)))
    assert not wrong


def _mean_and_inverse(x, eps):
    return x.float().mean((0, 2)), (x.float().var((0, 2), correction=0) + eps).rsqrt()


def _gathered(_, means, inverses, mean_kept, var_kept, momentum, eps, counts):
    assert mean_kept is var_kept is None and counts.shape == means.shape[:1]
    mean = (means * counts[:, None]).sum(0) / counts.sum()
    spread = inverses**-2 - eps + (means - mean) ** 2
    return mean, ((spread * counts[:, None]).sum(0) / counts.sum() + eps).rsqrt()


def _normal(x, weight, bias, mean, inverse, eps):
    return ((x.float() - mean[:, None]) * inverse[:, None]).to(x.dtype)


def _sums(grad, x, mean, inverse, weight, *_):
    return grad.float().sum((0, 2)), (grad.float() * (x.float() - mean[:, None])).sum((0, 2)), None, None


def _to_x(grad, x, mean, inverse, weight, sum_grad, sum_product, counts):
    n, (mean, inverse, sum_grad, sum_product) = (
        counts.sum(),
        (v[:, None] for v in (mean, inverse, sum_grad, sum_product)),
    )
    pulled = grad.float() - sum_grad / n - (x.float() - mean) * inverse**2 * sum_product / n
    return (pulled * inverse).to(x.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("pieces", [1, 4, 64])
def test_instances_in_pieces_are_normalised_as_whole_ones(dtype, tolerance, pieces, monkeypatch):
    """SyncBatchNorm's kernels, which a CPU lacks, by what they compute; on a GPU test_cuda.py has the real ones."""
    kernels = {
        "batch_norm_stats": _mean_and_inverse, "batch_norm_gather_stats_with_counts": _gathered,
        "batch_norm_elemt": _normal, "batch_norm_backward_reduce": _sums, "batch_norm_backward_elemt": _to_x,
    }  # fmt: skip
    for name, kernel in kernels.items():
        monkeypatch.setattr(torch, name, kernel)
    x, pull = torch.randn(2, 3, 8, 16, 4) * 3 + 5, torch.randn(2, 3, 8, 16, 4)
    ours, exact = x.to(dtype).clone().requires_grad_(), x.to(dtype).double().requires_grad_()
    normal = layers._NormaliseInPieces.apply(ours, pieces, 1e-5)
    wanted = F.instance_norm(exact, eps=1e-5)
    torch.testing.assert_close(normal.double(), wanted, rtol=tolerance, atol=tolerance)
    normal.mul_(2).backward(pull.to(dtype))  # in place, as a ReLU works
    wanted.mul(2).backward(pull.to(dtype).double())
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)
