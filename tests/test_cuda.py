"""The same arithmetic on a CUDA device; skipped where there is none."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import method
from torch.nn import functional as F

from sdcl.graphs import recorded
from sdcl.inference import slice_wise, sliding_window
from sdcl.losses import discrepancy, mixed_losses
from sdcl.methods import get
from sdcl.methods.sdcl import self_train_step
from sdcl.mixing import copy_paste_mask
from sdcl.networks import build_network
from sdcl.networks.layers import InstanceNorm
from sdcl.runs.devices import place, set_arithmetic
from sdcl.steps import add_teacher, make_learners, pretrain_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
PAIRS = [(("unet", "resunet"), (32, 48)), (("vnet_lowres", "resvnet_lowres"), (64, 64, 32))]


@pytest.fixture(autouse=True)
def deterministic():
    set_arithmetic(deterministic=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("is_together", [False, True])
def test_losses_and_gradients_are_the_cpus(is_together):
    logits, other = torch.randn(2, 2, 3, 24, 20).unbind(0)
    labels = torch.randint(3, (2, 2, 24, 20), dtype=torch.uint8)
    mask = torch.ones(24, 20).bool()
    mask[4:12, 3:9] = False
    results = []
    for device in ("cpu", "cuda"):
        z, second = logits.to(device).requires_grad_(), other.to(device)
        losses = mixed_losses(
            [z, second] if is_together else z, *labels.to(device), mask.to(device), image_weight=0.5, patch_weight=1.0,
            dice="batch", discrepancy=discrepancy(z, second),
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(sum(losses.values()).sum(), z)
        results.append([*(value.detach().cpu() for value in losses.values()), gradient.cpu()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("names", "shape"), [*PAIRS, (("vnet", "resvnet"), (32, 16, 16))])
@pytest.mark.parametrize(("precision", "optimiser"), [("fp32", "adam"), ("bf16", "adam"), ("fp32", "muon")])
def test_two_runs_of_both_steps_give_the_same_bits(names, shape, precision, optimiser):
    """Self-training's step after a checkpoint of the optimisers in the host's memory, as a run's."""

    def run():
        torch.manual_seed(0)
        networks = (build_network(name, 2).to("cuda") for name in names)
        learners = make_learners(*networks, base_lr=1e-3, optimiser=optimiser)
        batch = {key: torch.randn(2, 1, *shape).to("cuda") for key in ("x_a", "x_b", "u_a", "u_b")}
        batch |= {key: torch.randint(2, (2, *shape), dtype=torch.uint8).to("cuda") for key in ("y_a", "y_b")}
        mask = torch.ones(shape).bool()
        mask[4:12] = False
        settings = method(precision=precision, connectivity=8 if len(shape) == 2 else 26)
        pretrain_step(learners, batch, mask.to("cuda"), settings)
        file = io.BytesIO()
        torch.save(learners.state(), file)
        file.seek(0)
        learners.load(torch.load(file, map_location="cpu"), Path("last.pth"))
        add_teacher(learners)
        self_train_step(learners, batch, mask.to("cuda"), settings)
        return learners.networks["teacher"].state_dict()

    first, second = run(), run()
    assert all(
        torch.equal(value, second[name]) and torch.isfinite(value.float()).all() for name, value in first.items()
    )


@pytest.mark.parametrize(("name", "precision"), [("sdcl", "fp32"), ("sdcl", "bf16"), ("ua_mt", "bf16")])
@pytest.mark.parametrize(("names", "shape"), [*PAIRS, (("vnet", "resvnet"), (48, 48, 32))])
def test_recorded_passes_give_the_bits_of_those_that_are_not(names, shape, precision, name):
    """Losses, weights, statistics and random numbers, in both stages; ua_mt's passes are of two kinds."""

    def run(is_recorded):
        torch.manual_seed(0)
        learners = make_learners(*(place(build_network(name, 2), torch.device("cuda")) for name in names), base_lr=1e-3)
        batch = {key: torch.randn(2, 1, *shape).to("cuda") for key in ("x_a", "x_b", "u_a", "u_b")}
        batch |= {key: torch.randint(2, (2, *shape), dtype=torch.uint8).to("cuda") for key in ("y_a", "y_b")}
        mask = torch.ones(shape).bool()
        mask[4:12] = False
        settings = method(precision=precision, connectivity=8 if len(shape) == 2 else 26, method=name, passes=2)
        found = []
        for stage, steps in (("pre_train", 3), ("self_train", 3)):
            if stage == "self_train":
                learners.keep(get(name).students)
                if get(name).has_teacher:
                    add_teacher(learners)
            step = pretrain_step if stage == "pre_train" else get(name).self_train_step
            for network in learners.networks.values():
                network.train()
            with recorded(learners.networks.values() if is_recorded else ()):
                for number in range(steps):
                    torch.manual_seed(number)
                    found += step(learners, batch, mask.to("cuda"), settings).values()
                    found.append(torch.rand(1, device="cuda"))
                    learners.iteration += 1
                assert not is_recorded or all(network.forward.kinds for network in learners.networks.values())
        found += [value for network in learners.networks.values() for value in network.state_dict().values()]
        return [value.detach().clone() for value in found]

    first, second = run(False), run(True)
    assert len(first) == len(second)
    assert [torch.equal(a, b) for a, b in zip(first, second, strict=True)].count(False) == 0


def test_a_pass_before_the_last_one_went_backward_is_not_recorded():
    network, image = build_network("vnet", 2).to("cuda"), torch.randn(1, 1, 16, 16, 16, device="cuda")
    image_b = torch.randn_like(image)
    for module in (m for m in network.modules() if isinstance(m, torch.nn.Dropout3d)):
        module.p = 0.0
    gradients = []
    for networks in ([], [network]):
        with recorded(networks):
            for _ in range(2):  # the first time they are recorded
                network.zero_grad(set_to_none=False)
                first, second = network(image), network(image_b)
                first.square().sum().backward()
                second.square().sum().backward()
                del first, second  # what holds on to a pass keeps its parameters' stream
        gradients.append([p.grad.clone() for p in network.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_instances_are_normalised_as_in_float64(dtype, tolerance, memory_format):
    """As float64 does it on a CPU; far from 0, and once with voxels that are all the same."""
    shape = (2, 3, 64, 48, 24)
    x, pull = (torch.randn(shape) + 3).to(dtype), torch.randn(shape).to(dtype)
    x[1, 2] = 3
    ours, exact = x.to("cuda", memory_format=memory_format).requires_grad_(), x.double().requires_grad_()
    normal, wanted = InstanceNorm(3)(ours), F.instance_norm(exact)
    assert normal.dtype == dtype
    torch.testing.assert_close(normal.cpu().double(), wanted, rtol=tolerance, atol=tolerance)
    normal.mul_(2).backward(pull.to("cuda"))  # in place, as a ReLU works
    wanted.mul(2).backward(pull.double())
    found, scale = ours.grad.cpu().double(), exact.grad[1, 2].abs().max()  # the constant's are divided by sqrt(eps)
    torch.testing.assert_close(found[:, :2], exact.grad[:, :2], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[1, 2] / scale, exact.grad[1, 2] / scale, rtol=tolerance, atol=tolerance)


def test_volumes_are_predicted_as_on_the_cpu():
    rng = np.random.default_rng(0)
    for name, predict, shape, arguments in (
        ("unet", slice_wise, (3, 40, 50), ((32, 32),)),
        ("vnet", sliding_window, (40, 24, 20), ((32, 16, 16), (8, 8, 8))),
    ):
        network, volume = build_network(name, 2), rng.standard_normal(shape).astype(np.float32)
        (cpu,) = predict([network], volume, *arguments, 2)
        (gpu,) = predict([network.to("cuda")], volume, *arguments, 2)
        np.testing.assert_allclose(cpu, gpu, atol=1e-3)


def test_no_step_waits_for_the_device():
    learners = make_learners(*(build_network(name, 2).to("cuda") for name in ("unet", "resunet")), base_lr=1e-3)
    add_teacher(learners)
    batch = {key: torch.randn(2, 1, 32, 48).to("cuda") for key in ("x_a", "x_b", "u_a", "u_b")}
    batch |= {key: torch.randint(2, (2, 32, 48), dtype=torch.uint8).to("cuda") for key in ("y_a", "y_b")}
    mask = copy_paste_mask((32, 48), (20, 30), device="cuda")
    self_train_step(learners, batch, mask, method())  # the first one makes Adam's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = copy_paste_mask((32, 48), (20, 30), device="cuda")
        pretrain_step(learners, batch, mask, method())
        self_train_step(learners, batch, mask, method())
    finally:
        torch.cuda.set_sync_debug_mode("default")
