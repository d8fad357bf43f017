"""Muon against its definition, PyTorch's own and Adam; and a run with it, stopped and gone on with."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import method
from hypothesis import given, settings
from hypothesis import strategies as st
from test_3d import call
from torch import nn

from sdcl import checkpoints
from sdcl.mixing import copy_paste_mask
from sdcl.muon import Muon, orthogonal
from sdcl.networks import build_network
from sdcl.runs.errors import UserError
from sdcl.steps import make_learners, pretrain_step


def near_one(s):
    """The published polynomial on one singular value, five times."""
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return s


def weight(*values, shape):
    parameter = nn.Parameter(torch.tensor(values, dtype=torch.float64).view(shape))
    parameter.grad = torch.zeros_like(parameter)
    return parameter


@settings(deadline=None)  # the first call wakes LAPACK
@given(st.tuples(st.integers(1, 3), st.integers(1, 8), st.integers(1, 8)), st.integers(0, 2**31), st.floats(1e-6, 1e6))
def test_singular_values_move_and_their_vectors_stay(shape, seed, scale):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    u, values, v = torch.linalg.svd(matrices, full_matrices=False)
    share = values / values.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(orthogonal([matrices])[0], u * near_one(share)[:, None] @ v, rtol=1e-6, atol=1e-7)


def test_float32_and_values_of_any_size_do():
    """The product with the transpose squares what is small; from 1 down to 0.003 of the norm all end near 1."""
    u, _, v = torch.linalg.svd(torch.randn(64, 576, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    values = torch.logspace(0, -2.2, 64)
    found = torch.linalg.svdvals(orthogonal([((u * values) @ v)[None]])[0][0])
    assert found.min() > 0.67 and found.max() < 1.22
    assert not orthogonal([torch.zeros(1, 3, 4)])[0].any()
    for size in (1e38, 1e-12, 1e-17, 1e-20, 1e-25, 1e-38, 1e-44):
        assert torch.isfinite(orthogonal([torch.full((1, 3, 4), size)])[0]).all()


def test_stacks_of_many_shapes_are_each_their_own():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 9), (1, 16, 4), (3, 4, 4), (1, 2, 30), (1, 1, 1))
    stacks = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    for alone, found in zip(stacks, orthogonal(stacks), strict=True):
        torch.testing.assert_close(found, orthogonal([alone])[0])


def test_two_steps_by_hand():
    """A diagonal weight of 1x1 convolutions: M = G, the step is of G + 0.95 M; then M = 0.95 M + G'."""
    moved, bias = weight(1.0, 0.0, 0.0, 1.0, shape=(2, 2, 1, 1)), weight(0.0, shape=(1,))
    optimiser = Muon([moved, bias], lr=0.1)
    expected, momentum = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for gradient in (torch.tensor([3.0, 1.0]).double(), torch.tensor([-1.0, 4.0]).double()):
        moved.grad = torch.diag(gradient)[:, :, None, None]
        optimiser.step()
        momentum = 0.95 * momentum + gradient
        step = gradient + 0.95 * momentum
        expected -= 0.1 * math.sqrt(2) * near_one(step / step.norm())
    torch.testing.assert_close(moved.detach()[:, :, 0, 0], torch.diag(expected))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch 2.9 or later has its own")
def test_it_is_pytorchs_on_matrices():
    """Which computes in bf16, and whose steps have a root mean square of a fifth of ours."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(8, 20, generator=generator)
    ours, theirs, bias = nn.Parameter(start.clone()), nn.Parameter(start.clone()), weight(0.0, shape=(1,))
    pair = (
        Muon([ours, bias], lr=1e-2),
        torch.optim.Muon([theirs], lr=5e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(5):
        ours.grad = torch.randn(8, 20, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimiser in pair:
            optimiser.step()
    torch.testing.assert_close(ours - start, theirs - start, atol=2e-3, rtol=0)


def test_a_weight_without_a_gradient_stays():
    frozen, moved = weight(1.0, 2.0, shape=(1, 2)), weight(1.0, 2.0, shape=(1, 2))
    frozen.grad, moved.grad = None, torch.ones_like(moved)
    optimiser = Muon([frozen, moved], lr=0.1, weight_decay=0.1)  # with nothing for Adam
    optimiser.step()
    assert frozen.tolist() == [[1.0, 2.0]] and set(optimiser.state) == {moved}
    expected = torch.tensor([[1.0, 2.0]]) * 0.99 - 0.1 * math.sqrt(2) * near_one(torch.tensor(1.0)) / math.sqrt(2)
    torch.testing.assert_close(moved.detach().float(), expected)


def test_a_loaded_state_lies_where_the_device_needs_it():
    """As a fused Adam's own does, counts of steps included; checkpoints are read into the host's memory."""
    on_host = [weight(1.0, 2.0, shape=(1, 2)), weight(1.0, shape=(1,))]
    optimiser = Muon(on_host, lr=0.1)
    optimiser.step()
    elsewhere = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta")) for p in on_host]
    loaded = Muon(elsewhere, lr=0.1)
    loaded.load_state_dict(optimiser.state_dict())
    values = {f"{name} {p.ndim}": v for p, state in loaded.state.items() for name, v in state.items()}
    assert set(values) == {"momentum 2", "step 1", "exp_avg 1", "exp_avg_sq 1"}
    assert {value.device.type for value in values.values()} == {"meta"}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_what_is_no_matrix_moves_as_by_adam_and_all_decay(decay):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    twin = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    twin.load_state_dict(network.state_dict())
    pair = (
        Muon(network.parameters(), lr=1e-2, weight_decay=decay),
        torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=decay),
    )
    before = [p.detach().clone() for p in network.parameters()]
    for p, q in zip(network.parameters(), twin.parameters(), strict=True):
        p.grad = torch.zeros_like(p) if p.ndim > 1 else torch.randn_like(p)
        q.grad = p.grad.clone()
    for optimiser in pair:
        optimiser.step()
    for p, q, old in zip(network.parameters(), twin.parameters(), before, strict=True):
        torch.testing.assert_close(p, q)
        if p.ndim > 1:
            torch.testing.assert_close(p.detach(), old * (1 - 1e-2 * decay))


def test_nothing_moves_once_a_gradient_is_not_finite():
    torch.manual_seed(0)
    learners = make_learners(build_network("unet", 2), build_network("unet", 2), 1e-3, 0.1, "muon")
    batch = {name: torch.randn(2, 1, 32, 32) for name in ("x_a", "x_b")}
    batch |= {f"y_{d}": (batch[f"x_{d}"][:, 0] > 1).to(torch.uint8) for d in "ab"}
    mask = copy_paste_mask((32, 32), (16, 16))
    pretrain_step(learners, batch, mask, method())

    def all_of():
        """Weights, and what the optimisers keep of each."""
        weights = [p for student in learners.students for p in student.parameters()]
        kept = [v for o in learners.optimisers.values() for state in o.state.values() for v in state.values()]
        return [value.detach().clone() for value in (*weights, *kept)]

    held = all_of()
    batch["x_a"][0, 0, 0, 0] = math.nan
    pretrain_step(learners, batch, mask, method())
    assert learners.halted == 1
    for old, now in zip(held, all_of(), strict=True):
        assert torch.equal(old, now)


def test_a_run_with_it_goes_on_to_the_same_bits(acdc_phantom, tmp_path):
    """From a checkpoint in self-training, which had begun from stage 1's; a run of Adam is no beginning for it."""
    call_with = lambda exp, *flags: call(  # noqa: E731
        "ACDC_train.py", "--root_path", acdc_phantom, "--models_path", tmp_path, "--labelnum", 2, "--batch_size", 2,
        "--patch_size", 32, 32, "--pre_iterations", 2, "--select", "last", "--exp", exp, *flags,
    )  # fmt: skip
    call_with("whole", "--optimiser", "muon", "--self_iterations", 3)
    call_with("parts", "--optimiser", "muon", "--self_iterations", 1)
    call_with("parts", "--optimiser", "muon", "--self_iterations", 3)
    whole, parts = (
        checkpoints.load(tmp_path / f"acdc_{exp}_2_labeled" / "self_train" / "last.pth") for exp in ("whole", "parts")
    )
    for role in ("student_a", "student_b", "teacher"):
        for name, values in whole["networks"][role].items():
            assert torch.equal(values, parts["networks"][role][name])
    kept = whole["optimisers"]["student_a"]
    of_matrices = {i for group in kept["param_groups"][1:] for i in group["params"]}
    assert {i for i, state in kept["state"].items() if set(state) == {"momentum"}} == of_matrices
    with pytest.raises(UserError, match="optimiser muon there, adam now"):
        call_with("parts", "--self_iterations", 3)
    other = "was trained with optimiser {}, not {}: choose a run of the same --optimiser"
    with pytest.raises(UserError, match=other.format("muon", "adam")):
        call_with("other", "--self_iterations", 1, "--pretrained", tmp_path / "acdc_whole_2_labeled")
    call_with("older", "--self_iterations", 0)
    path = tmp_path / "acdc_older_2_labeled" / "config.json"
    content = json.loads(path.read_text())
    del content["config"]["optimiser"]  # as before there was another
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=other.format("adam", "muon")):
        call_with("other", "--self_iterations", 1, "--optimiser", "muon", "--pretrained", path.parent)


@pytest.mark.parametrize(("of", "given_to"), [("adam", "muon"), ("muon", "adam")])
def test_a_state_of_the_other_optimiser_is_refused(of, given_to):
    torch.manual_seed(0)
    learners = make_learners(build_network("unet", 2), build_network("unet", 2), 1e-3, optimiser=of)
    batch = {name: torch.randn(2, 1, 32, 32) for name in ("x_a", "x_b")}
    batch |= {f"y_{d}": (batch[f"x_{d}"][:, 0] > 1).to(torch.uint8) for d in "ab"}
    pretrain_step(learners, batch, copy_paste_mask((32, 32), (16, 16)), method())
    other = make_learners(build_network("unet", 2), build_network("unet", 2), 1e-3, optimiser=given_to)
    with pytest.raises(UserError, match="last.pth does not fit: its optimiser's state is not that of these networks"):
        other.load(learners.state(), Path("last.pth"))
