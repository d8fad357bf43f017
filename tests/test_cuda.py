"""The same arithmetic on a CUDA device; skipped where there is none."""

import numpy as np
import pytest
import torch
from helpers import method

from sdcl.inference import slice_wise, sliding_window
from sdcl.losses import discrepancy, mixed_losses
from sdcl.methods.sdcl import self_train_step
from sdcl.mixing import copy_paste_mask
from sdcl.networks import build_network
from sdcl.runs.devices import set_arithmetic
from sdcl.steps import add_teacher, make_learners, pretrain_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


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


@pytest.mark.parametrize(("names", "shape"), [(("unet", "resunet"), (32, 48)), (("vnet", "resvnet"), (32, 16, 16))])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_runs_of_both_steps_give_the_same_bits(names, shape, precision):
    def run():
        torch.manual_seed(0)
        learners = make_learners(*(build_network(name, 2).to("cuda") for name in names), base_lr=1e-3)
        batch = {key: torch.randn(2, 1, *shape).to("cuda") for key in ("x_a", "x_b", "u_a", "u_b")}
        batch |= {key: torch.randint(2, (2, *shape), dtype=torch.uint8).to("cuda") for key in ("y_a", "y_b")}
        mask = torch.ones(shape).bool()
        mask[4:12] = False
        settings = method(precision=precision, connectivity=8 if len(shape) == 2 else 26)
        pretrain_step(learners, batch, mask.to("cuda"), settings)
        add_teacher(learners)
        self_train_step(learners, batch, mask.to("cuda"), settings)
        return learners.networks["teacher"].state_dict()

    first, second = run(), run()
    assert all(
        torch.equal(value, second[name]) and torch.isfinite(value.float()).all() for name, value in first.items()
    )


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
