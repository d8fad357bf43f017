import json
from unittest import mock

import numpy as np
import pytest
import textbook
import torch
from helpers import GOLDEN, strided
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcl import losses as losses_module
from sdcl.losses import class_map, discrepancy, mixed_losses

CASES = json.loads((GOLDEN / "losses.json").read_text())
ARRAYS = np.load(GOLDEN / "losses.npz")
DICE = {"2d": "batch", "3d": "sample"}
NAMES = ("dice", "ce", "mse", "kl")


def weights(unlabelled_image):
    return (
        {"image_weight": 0.5, "patch_weight": 1.0} if unlabelled_image else {"image_weight": 1.0, "patch_weight": 0.5}
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
@pytest.mark.parametrize("row", [0, 1])
def test_golden_values_and_gradients(case, row):
    expected = case["rows"][row]
    logits, other, image_label, patch_label, mask = (
        torch.from_numpy(ARRAYS[f"{case['name']}/{key}"])
        for key in ("logits", "other_logits", "image_label", "patch_label", "mask")
    )
    logits.requires_grad_()
    where = discrepancy(logits, other)
    assert int(where.sum()) == expected["diff"]
    losses = mixed_losses(
        logits, image_label, patch_label, mask, **weights(expected["unlab"]), dice=DICE[case["kind"]], discrepancy=where
    )
    values = {"sup": (losses["dice"] + losses["ce"]) / 2, "mse": losses["mse"], "kl": losses["kl"]}
    for name, value in values.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-5, abs=1e-7)
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        figures = expected[f"grad_{name}"]
        assert gradient.norm().item() == pytest.approx(figures["l2"], rel=1e-5, abs=1e-9)
        np.testing.assert_allclose(strided(gradient, 16), figures["sample"], rtol=1e-4, atol=1e-8)


@st.composite
def batches(draw):
    """A random mixed batch of 1 to 3 dimensions, 2 to 5 classes, and any labels and mask."""
    classes, samples = draw(st.integers(2, 5)), draw(st.integers(1, 3))
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = [torch.randn(samples, classes, *shape, generator=generator) * 3 for _ in range(2)]
    labels = [torch.randint(classes, (samples, *shape), generator=generator, dtype=torch.uint8) for _ in range(2)]
    mask = torch.randint(2, tuple(shape), generator=generator).bool()
    return *logits, *labels, mask


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from(["sample", "batch"]), st.booleans())
def test_agrees_with_the_textbook(batch, dice, unlabelled_image):
    logits, other, image_label, patch_label, mask = batch
    where = discrepancy(logits, other)
    values, gradients = [], []
    for function in (mixed_losses, textbook.mixed_losses):
        z = (
            logits.double().clone().requires_grad_()
            if function is textbook.mixed_losses
            else logits.clone().requires_grad_()
        )
        losses = function(z, image_label, patch_label, mask, **weights(unlabelled_image), dice=dice, discrepancy=where)
        total = sum(k * losses[name] for k, name in enumerate(NAMES, start=1))
        values.append([losses[name].item() for name in NAMES])
        gradients.append(torch.autograd.grad(total, z)[0].double())
    np.testing.assert_allclose(values[0], values[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(batches(), st.sampled_from(["sample", "batch"]), st.integers(1, 40))
def test_chunks_of_any_length_give_the_textbooks_float64(batch, dice, chunk):
    """Exact to float64's rounding, however the voxels are cut."""
    logits, other, image_label, patch_label, mask = batch
    where = discrepancy(logits, other)
    results = []
    with mock.patch.object(losses_module, "CORE_CHUNK", chunk):
        for function in (mixed_losses, textbook.mixed_losses):
            z = logits.double().requires_grad_()
            losses = function(z, image_label, patch_label, mask, **weights(True), dice=dice, discrepancy=where)
            total = sum(k * losses[name] for k, name in enumerate(NAMES, start=1))
            results.append([*(losses[name] for name in NAMES), torch.autograd.grad(total, z)[0]])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(batches(), st.sampled_from(["sample", "batch"]), st.booleans(), st.booleans())
def test_students_taken_together_have_each_ones_losses(batch, dice, is_masked, is_corrected):
    logits, other, image_label, patch_label, mask = batch
    given = (image_label, patch_label, mask if is_masked else None)
    call = weights(True) | {"dice": dice, "discrepancy": discrepancy(logits, other) if is_corrected else None}
    alone, together = ([z.double().requires_grad_() for z in (logits, other)] for _ in range(2))
    expected = [mixed_losses(z, *given, **call) for z in alone]
    found = mixed_losses(together, *given, **call)
    for k, name in enumerate(NAMES, start=1):
        torch.testing.assert_close(found[name], torch.stack([losses[name] for losses in expected]))
        for loss in (k * found[name].sum(), *(k * losses[name] for losses in expected)):
            loss.backward(retain_graph=True)
    torch.testing.assert_close([z.grad for z in together], [z.grad for z in alone])


def test_losses_of_an_evaluation_may_be_those_of_a_training_later():
    """Neither constants made while nothing is trained nor labels that change before backward() get in its way."""
    for constants in (losses_module._table, losses_module._pair):
        constants.cache_clear()
    logits, label = torch.randn(1, 2, 4, 4, requires_grad=True), torch.ones(1, 4, 4, dtype=torch.uint8)
    call = {**weights(True), "dice": "batch"}
    with torch.inference_mode():
        mixed_losses(logits, label, label, None, **call)
    (expected,) = torch.autograd.grad(mixed_losses(logits, label, label, None, **call)["ce"], logits)
    loss = mixed_losses(logits, label, label, None, **call)["ce"]
    label.zero_()
    assert torch.equal(torch.autograd.grad(loss, logits)[0], expected) and expected.abs().sum() > 0


def test_weights_that_change_are_read_anew():
    logits, label, weight = torch.randn(1, 2, 4, 4), torch.ones(1, 4, 4, dtype=torch.uint8), torch.tensor(0.5)
    call = {"image_weight": weight, "patch_weight": 0, "dice": "batch"}
    half = mixed_losses(logits, label, label, None, **call)["ce"].item()
    weight.fill_(0.1)
    assert half == pytest.approx(5 * mixed_losses(logits, label, label, None, **call)["ce"].item())


@pytest.mark.parametrize("shapes", [[], [(1, 2, 4, 4), (1, 3, 4, 4)], [(1, 2, 4, 4), (1, 2, 4, 5)]])
def test_students_that_do_not_fit_each_other_are_refused(shapes):
    label = torch.zeros(1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="one student at least, all of one shape on one device; these are"):
        mixed_losses([torch.zeros(shape) for shape in shapes], label, label, None, **weights(True), dice="batch")
    if shapes:
        with pytest.raises(ValueError, match="all of one shape on one device; these are"):
            discrepancy(*(torch.zeros(shape) for shape in shapes))


def test_the_hand_derived_gradient_is_the_numerical_one():
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 2, 3, 4, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (2, 2, 4, 3), generator=generator, dtype=torch.uint8)
    mask = torch.arange(12).view(4, 3) % 3 > 0
    where = discrepancy(logits, other)
    for dice in DICE.values():
        torch.autograd.gradcheck(
            lambda z, dice=dice: tuple(
                mixed_losses(z, *labels, mask, **weights(True), dice=dice, discrepancy=where).values()
            ),
            logits.clone().requires_grad_(),
        )


def test_many_classes_are_counted_beyond_a_byte():
    classes = 60
    logits = torch.randn(1, classes, 9, 9, requires_grad=True)
    labels = torch.randint(classes, (2, 1, 9, 9), dtype=torch.uint8)
    mask, where = torch.eye(9).bool(), torch.rand(1, 9, 9) > 0.5
    call = {**weights(False), "dice": "sample", "discrepancy": where}
    ours, theirs = (f(logits, *labels, mask, **call) for f in (mixed_losses, textbook.mixed_losses))
    for name in NAMES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_losses_may_be_added_up_in_place():
    logits = torch.randn(2, 2, 8, 8, requires_grad=True)
    label = torch.zeros(2, 8, 8, dtype=torch.uint8)
    found = mixed_losses(logits, label, label, None, image_weight=1.0, patch_weight=1.0, dice="sample")
    expected = found["dice"].item() + found["ce"].item()
    loss = found["dice"]
    loss += found["ce"]
    loss.backward()
    assert loss.item() == pytest.approx(expected) and logits.grad.abs().sum() > 0


def test_by_hand():
    """One voxel a region, two classes, logits of 0: every probability is 1/2."""
    logits = torch.zeros(1, 2, 2, requires_grad=True)
    image_label, patch_label = torch.tensor([[1, 0]]), torch.tensor([[0, 1]])
    mask = torch.tensor([True, False])  # both voxels then have the target 1, and argmax decides 0
    losses = mixed_losses(
        logits, image_label, patch_label, mask, image_weight=0.5, patch_weight=1.0, dice="sample",
        discrepancy=torch.tensor([[True, True]]),
    )  # fmt: skip
    assert losses["ce"].item() == pytest.approx(1.5 * np.log(2))
    # Class 1 overlaps by 1/2 of a mass of 1/2 + 1; class 0 by nothing of a mass of 1/2.
    assert losses["dice"].item() == pytest.approx(1.5 * (1 - (1 / 1.5 + 0) / 2), rel=1e-4)
    assert losses["mse"].item() == pytest.approx((0.5 + 1) / 2 * 0.25)
    assert losses["kl"].item() == pytest.approx((0.5 + 1) / 2 * np.log(2))


def test_kl_only_counts_where_this_student_is_wrong():
    logits = torch.tensor([[[4.0, 4.0], [0.0, 0.0]]])  # decides class 0 at both voxels
    label = torch.tensor([[0, 1]])
    everywhere = torch.ones(1, 2, dtype=torch.bool)
    losses = mixed_losses(
        logits, label, label, everywhere[0], image_weight=1, patch_weight=1, dice="batch", discrepancy=everywhere
    )
    expected = -torch.log_softmax(logits[0, :, 1], 0).mean()
    assert losses["kl"].item() == pytest.approx(expected.item())


def test_no_discrepancy_gives_zero_and_a_zero_gradient():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    label, nowhere = torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, 4, 4, dtype=torch.bool)
    mask = torch.eye(4).bool()
    losses = mixed_losses(
        logits, label, label, mask, image_weight=1, patch_weight=0.5, dice="batch", discrepancy=nowhere
    )
    for name in ("mse", "kl"):
        assert losses[name].item() == 0
        assert torch.autograd.grad(losses[name], logits, retain_graph=True)[0].abs().max() == 0


def test_without_a_mask_the_region_is_the_whole_patch():
    logits, label = torch.randn(2, 2, 4, 4, 4), torch.randint(2, (2, 4, 4, 4))
    losses = mixed_losses(logits, label, label, None, image_weight=1, patch_weight=1, dice="sample")
    everywhere = torch.ones(2, 4, 4, 4)
    assert losses["dice"].item() == pytest.approx(textbook.dice_sample(logits, label, everywhere).item(), rel=1e-5)
    assert losses["ce"].item() == pytest.approx(textbook.cross_entropy(logits, label, everywhere).item(), rel=1e-5)
    assert losses["mse"] == losses["kl"] == 0


def test_half_precision_logits_are_reduced_in_float32():
    logits = (torch.randn(1, 2, 64, 64) * 4).bfloat16()
    label = torch.randint(2, (1, 64, 64))
    call = {"image_weight": 1, "patch_weight": 1, "dice": "batch", "discrepancy": torch.ones_like(label).bool()}
    with torch.autocast("cpu", torch.bfloat16):
        half = mixed_losses(logits, label, label, label[0], **call)
    full = mixed_losses(logits.float(), label, label, label[0], **call)
    for name in NAMES:
        assert half[name].dtype == torch.float32
        assert half[name].item() == full[name].item()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_label": torch.zeros(2, 4, 5).long()}, "image_label has the shape"),
        ({"patch_label": torch.zeros(1, 4, 4).long()}, "patch_label has the shape"),
        ({"mask": torch.ones(4, 3)}, "mask has the shape"),
        ({"discrepancy": torch.ones(4, 4).bool()}, "discrepancy has the shape"),
        ({"dice": "voxel"}, "unknown kind of Dice 'voxel'"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    label = torch.zeros(2, 4, 4).long()
    call = {"logits": torch.zeros(2, 3, 4, 4), "image_label": label, "patch_label": label, "mask": torch.ones(4, 4)}
    with pytest.raises(ValueError, match=message):
        mixed_losses(**(call | {"image_weight": 1, "patch_weight": 1, "dice": "batch"} | change))


@pytest.mark.parametrize("value, dtype", [(2, torch.uint8), (256, torch.int64), (-256, torch.int64), (-1, torch.int8)])
def test_labels_beyond_the_classes_are_refused(value, dtype):
    label = torch.full((1, 4, 4), value, dtype=dtype)
    with pytest.raises(RuntimeError, match="labels must lie in"):
        mixed_losses(torch.zeros(1, 2, 4, 4), label, label, None, image_weight=1, patch_weight=1, dice="batch")


def small_batch(classes=3):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, 4, 5, generator=generator)
    labels = [torch.randint(min(classes, 3), (2, 4, 5), generator=generator) for _ in range(2)]
    mask = torch.rand(4, 5, generator=generator) > 0.4
    where = torch.rand(2, 4, 5, generator=generator) > 0.5
    return logits, labels, mask, where


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_a_discrepancy_of_any_numbers_is_where_they_are_not_0(dtype):
    logits, labels, mask, where = small_batch()
    expected = mixed_losses(logits, *labels, mask, **weights(True), dice="batch", discrepancy=where)
    given = mixed_losses(logits, *labels, mask, **weights(True), dice="batch", discrepancy=where.to(dtype) * 255)
    assert {name: value.item() for name, value in given.items()} == {n: v.item() for n, v in expected.items()}


@pytest.mark.parametrize("which", [0, 1])
def test_labels_that_are_no_integers_are_refused(which):
    logits, labels, mask, _ = small_batch()
    labels[which] = labels[which] + 0.5
    with pytest.raises(ValueError, match="_label is of the type torch.float32, it needs whole numbers"):
        mixed_losses(logits, *labels, mask, **weights(True), dice="batch")


def test_an_impossible_class_that_no_target_has_leaves_the_losses_right():
    """With -inf for class 3, Dice, CE and MSE are those of a very low logit; the KL term is infinite."""
    logits, labels, mask, where = small_batch(classes=4)
    low, never = logits.clone(), logits.clone()
    low[:, 3], never[:, 3] = -80.0, -torch.inf
    with_kl = {"discrepancy": where, "dice": "sample", **weights(False)}
    expected, given = (mixed_losses(z.requires_grad_(), *labels, mask, **with_kl) for z in (low, never))
    for name in ("dice", "ce", "mse"):
        assert given[name].item() == pytest.approx(expected[name].item(), rel=1e-6)
    assert given["kl"].item() == torch.inf
    (gradient,) = torch.autograd.grad(given["dice"] + given["ce"] + given["mse"], never)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    nowhere = mixed_losses(never, *labels, mask, **(with_kl | {"discrepancy": torch.zeros_like(where)}))
    assert nowhere["kl"].item() == 0


def test_a_target_of_probability_0_has_an_infinite_cross_entropy():
    logits, labels, mask, _ = small_batch()
    logits[0, labels[0][0, 0, 0], 0, 0] = -torch.inf
    mask[0, 0] = True
    assert mixed_losses(logits, *labels, mask, **weights(True), dice="batch")["ce"].item() == torch.inf


@pytest.mark.parametrize(("classes", "dtype"), [(2, torch.uint8), (256, torch.uint8), (257, torch.int32)])
def test_class_maps_are_bytes_while_bytes_can_count_the_classes(classes, dtype):
    scores = torch.zeros(1, classes, 2)
    scores[0, -1, 1] = 1
    classes_of = class_map(scores)
    assert classes_of.dtype == dtype and classes_of.tolist() == [[0, classes - 1]]


def test_more_than_256_classes_do_not_wrap():
    logits = torch.zeros(1, 300, 2, 2)
    logits[0, 299, 0, 0] = logits[0, 257, 0, 1] = 9.0
    assert losses_module.class_map(logits).tolist() == [[[299, 257], [0, 0]]]
    other = torch.zeros(1, 300, 2, 2)
    other[0, 299 - 256, 0, 0] = 9.0
    assert discrepancy(logits, other)[0, 0].tolist() == [True, True]
    target = torch.tensor([[[299, 257], [0, 0]]])
    found = mixed_losses(logits, target, target, None, **weights(True), dice="batch", discrepancy=torch.ones(1, 2, 2))
    assert found["kl"].item() == 0  # this one is right everywhere
    plain = torch.nn.functional.cross_entropy(logits, target)
    assert found["ce"].item() == pytest.approx(weights(True)["image_weight"] * plain.item(), rel=1e-5)
