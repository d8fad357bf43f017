"""The losses of one mixed batch: Dice, cross-entropy, and the two that act on the students' discrepancy."""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sdcl import ranks

DiceOver = Literal["sample", "batch"]
DICE_SMOOTH = {"sample": 1e-5, "batch": 1e-10}
REGIONS = ("image", "patch")
LOSSES = ("dice", "ce", "mse", "kl")
# What is worked on together: on a CPU so few voxels a core that what is made of them stays in its cache; elsewhere so
# many that these are at most so many numbers, 256 MiB.
CORE_CHUNK, DEVICE_NUMBERS = 2**15, 2**26
DEVICE_SPLITS = 256  # pieces of a sample whose sums other devices than a CPU take side by side
# Log-probabilities are no lower in the sums, since 0 voxels of -inf are nan; a sum that is, is infinite in the losses.
LEAST_LOG_P, INFINITE = -1e30, 1e29


def class_map(scores: Tensor) -> Tensor:
    """Return the class of the highest score at each voxel, the first of equal ones.

    What argmax over the classes says, in bytes instead of int64, and on a CPU ten times as fast: argmax strides over
    the classes voxel by voxel, this reads one class after the other. Elsewhere argmax is one kernel, and asked.

    Args:
        scores: logits or probabilities (N, C, *S).

    Returns:
        uint8 (N, *S), of more than 256 classes int32; without gradient.
    """
    dtype = torch.uint8 if scores.shape[1] <= 256 else torch.int32
    if scores.device.type != "cpu":
        return scores.detach().argmax(1).to(dtype)
    highest, *others = scores.detach().unbind(1)
    classes = torch.zeros_like(highest, dtype=dtype)
    for c, score in enumerate(others, start=1):
        classes = torch.maximum(classes, (score > highest).to(dtype) * c)  # where() is slow on bytes
        if c < len(others):
            highest = torch.maximum(highest, score)
    return classes


def discrepancy(logits_a: Tensor, logits_b: Tensor) -> Tensor:
    """Mark the voxels where two students decide differently.

    Args:
        logits_a: (N, C, *S).
        logits_b: the same shape.

    Returns:
        Bool tensor (N, *S), without gradient.

    Source: docs/method.md, "Stage 2", step 4.
    """
    return class_map(logits_a) != class_map(logits_b)


def mixed_losses(
    logits: Tensor,
    image_label: Tensor,
    patch_label: Tensor,
    mask: Tensor | None,
    *,
    image_weight: float,
    patch_weight: float,
    dice: DiceOver,
    discrepancy: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute the four losses of one student on one mixed batch, from one log-softmax in float32.

    Args:
        logits: (N, C, *S), any float dtype.
        image_label: (N, *S), integer classes; the target where the mask is 1.
        patch_label: (N, *S), the target where the mask is 0.
        mask: (*S) or (N, *S), bool or 0/1; None: the image's region is the whole batch.
        image_weight: weight of the region where the mask is 1.
        patch_weight: weight of the region where the mask is 0.
        dice: "sample" (Dice3D: sums per sample and class) or "batch" (Dice2D: sums over the whole batch, squared
            probabilities in the denominator).
        discrepancy: bool or 0/1 (N, *S), where the students disagree; None: "mse" and "kl" are 0.

    Returns:
        Scalars in float32: "dice" and "ce", each the weighted sum over the two regions; "mse", the pull to the target
        where the students disagree; "kl", the entropy raised where they disagree and this one is wrong. None of them
        carries its loss weight.

    Raises:
        ValueError: the shapes do not fit each other, labels are no integers, or the kind of Dice is unknown.
        RuntimeError: a label lies outside the classes (on a GPU later, at the next call that waits for it).

    Where torch.distributed has a group, each process gives its own samples, as many as every other. The losses are then
    those of the whole batch on each of them, and backward() gives the part of the own samples: add the gradients up
    (ranks.add_gradients(); a mean, such as DistributedDataParallel's, is too small by the number of processes).

    Source: docs/method.md, "Losses of one mixed batch".
    """
    _check_shapes(logits, image_label, patch_label, mask, discrepancy, dice)
    with torch.autocast(logits.device.type, enabled=False):  # sums stay in float32
        code, states = _codes(logits, image_label, patch_label, mask, discrepancy)
        sums = _CodeSums.apply(logits.flatten(2), code.flatten(1), len(REGIONS) * states * logits.shape[1])
        sums = ranks.gather(sums)  # of the whole batch
        sums = sums.unflatten(2, (len(REGIONS), states, logits.shape[1]))  # (N, 3 C + 1, region, state, target)
        return dict(zip(LOSSES, _LossesOfSums.apply(sums, (image_weight, patch_weight), dice), strict=True))


def _codes(
    logits: Tensor, image_label: Tensor, patch_label: Tensor, mask: Tensor | None, discrepancy: Tensor | None
) -> tuple[Tensor, int]:
    """Say all that the losses ask of a voxel beside its probabilities in one number: (region, state, target).

    The region is 0 where the mask is 1 and else 1; the state 0 where the students agree, 1 where they disagree and this
    one is right, 2 where it is wrong.

    Returns:
        (N, *S), uint8 while that can count them all, and the number of states: 1 without a discrepancy, else 3.
    """
    classes, states = logits.shape[1], 1 if discrepancy is None else 3
    dtype = torch.uint8 if len(REGIONS) * states * classes <= 256 else torch.int32
    for label in (image_label, patch_label):
        if label.dtype != torch.uint8:  # bytes would hide what is wrong with others
            torch._assert_async(((label >= 0) & (label < classes)).all(), f"labels must lie in [0, {classes})")
    target, code = image_label.to(dtype), 0
    if mask is not None:
        inside = mask.bool()
        target = target * inside + patch_label.to(dtype) * ~inside  # where() is slow on bytes
        code = (~inside).to(dtype) * (states * classes)
    torch._assert_async(target.max() < classes, f"labels must lie in [0, {classes})")  # waits for no GPU
    if discrepancy is not None:
        disagree = discrepancy.bool()  # of 0 and 255 too
        wrong = disagree & (class_map(logits) != target)
        code = code + (disagree.to(dtype) + wrong) * classes
    return code + target, states


class _LossesOfSums(torch.autograd.Function):
    """Compute the losses from the sums over the voxels of each sample, region, state and target.

    All of it is a few numbers, each kernel of which costs a GPU's launch: autograd's backward pass is some 110 of
    them, this one 30.
    """

    @staticmethod
    def forward(ctx: Any, sums: Tensor, weights: tuple[float, float], dice: DiceOver) -> tuple[Tensor, ...]:
        """Map sums (N, 3 C + 1, 2, 1 or 3, C), of p, p^2 and log p of each class, and the count, to LOSSES.

        Args:
            ctx: keeps what backward() needs.
            sums: over the voxels of each (sample, region, state, target).
            weights: of the two regions.
            dice: see mixed_losses().
        """
        classes, count = sums.shape[-1], sums[:, -1]  # (N, region, state, target)
        p, square, log_p = sums[:, :-1].unflatten(1, (3, classes)).unbind(1)  # (N, class, region, state, target)
        p_target, log_p_target = _of_target(p), _of_target(log_p)  # (N, region, state, target)
        weight = torch.full_like(sums[0, 0, :, 0, 0], weights[1])  # (region), made on the device
        weight[0].fill_(weights[0])

        # Dice: (N or 1, region, class); "batch" sums the samples too, and has squares in the denominator.
        overlap = p_target.sum(2)
        size = count.sum(2) + (p if dice == "sample" else square).sum((3, 4)).movedim(1, 2)
        if dice == "batch":
            overlap, size = overlap.sum(0, keepdim=True), size.sum(0, keepdim=True)
        doubled, size = 2 * overlap + DICE_SMOOTH[dice], size + DICE_SMOOTH[dice]
        dice_loss = 1 - (doubled / size).mean((0, 2))  # (region)
        voxels = count.sum((0, 2, 3)).clamp_min(1)  # (region)
        ce, entropy = _endless(-torch.stack([log_p_target.sum((0, 2, 3)), log_p[:, :, :, 2:].sum((0, 1, 3, 4))]))
        # mean_c (p_c - 1[t=c])^2 = (sum_c p_c^2 - 2 p_t + 1) / C: no one-hot tensor is needed.
        error = (square.sum(1) - 2 * p_target + count)[:, :, 1:].sum((0, 2, 3)) / classes
        acting, wrong = (count[:, :, state:].sum().clamp_min(1) for state in (1, 2))  # of no voxel the sum is 0 too
        ctx.save_for_backward(weight, doubled, size, voxels, acting, wrong)
        ctx.dice, ctx.shape = dice, sums.shape
        of_regions = torch.stack([dice_loss, ce / voxels, error, entropy / classes])
        dice_loss, ce, error, entropy = (weight * of_regions).sum(1).unbind()
        return dice_loss.clone(), ce.clone(), error / acting, entropy / wrong  # no views of each other

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Map the losses' gradients to the sums': 0 to counts, which no logit moves; of infinite ones as if finite."""
        weight, doubled, size, voxels, acting, wrong = ctx.saved_tensors
        of_dice, of_ce, of_mse, of_kl = grads
        classes, samples = ctx.shape[-1], len(size)
        result = torch.zeros(ctx.shape, dtype=weight.dtype, device=weight.device)
        p, square, log_p = result[:, :-1].unflatten(1, (3, classes)).unbind(1)
        p_target, log_p_target = _of_target(p), _of_target(log_p)

        per_size = (of_dice * weight / (samples * classes))[:, None] / size  # (N or 1, region, class)
        in_size = (per_size * doubled / size).movedim(2, 1)[..., None, None]
        (p if ctx.dice == "sample" else square).add_(in_size)
        p_target.sub_(2 * per_size[:, :, None])
        log_p_target.sub_((of_ce * weight / voxels)[:, None, None])
        pull = (of_mse * weight / (acting * classes))[:, None, None]
        square[:, :, :, 1:].add_(pull)
        p_target[:, :, 1:].sub_(2 * pull)
        log_p[:, :, :, 2:].sub_((of_kl * weight / (wrong * classes))[:, None, None])
        return result, None, None


def _of_target(of_classes: Tensor) -> Tensor:
    """Return of (N, class, region, state, target) what is of the target's class, a view (N, region, state, target)."""
    return of_classes.diagonal(dim1=1, dim2=4)


def _endless(sums: Tensor) -> Tensor:
    """Return sums of -log p, infinite where a p of 0 is among them."""
    return torch.where(sums > INFINITE, sums + torch.inf, sums)


class _CodeSums(torch.autograd.Function):
    """Sum p, p^2 and log p over the voxels of each code: all that the losses need of a batch.

    The full-size work is here and runs in chunks that stay in a core's cache. Only the logits and the codes, a byte a
    voxel, wait for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, code: Tensor, codes: int) -> Tensor:
        """Map logits (N, C, V) and codes (N, V) below `codes` to sums (N, 3 C + 1, codes), the last the count."""
        ctx.save_for_backward(logits, code)
        ctx.codes = codes
        classes, sums, splits = logits.shape[1], 0, _splits(logits)
        for z, is_code in _chunks(_split(logits, splits), _split(code, splits), codes):
            features = z.new_ones(len(z), 3 * classes + 1, z.shape[2])
            p, square, log_p, _ = features.split(classes, 1)
            torch.clamp(F.log_softmax(z, 1), min=LEAST_LOG_P, out=log_p)
            torch.exp(log_p, out=p)
            torch.mul(p, p, out=square)
            sums = sums + features @ is_code.mT
        return sums if splits == 1 else sums.unflatten(0, (-1, splits)).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor, None, None]:
        """Map the sums' gradient to the logits'."""
        logits, code = ctx.saved_tensors
        splits = _splits(logits)
        logits, code = _split(logits, splits), _split(code, splits)
        per_code = grad_sums[:, :-1].repeat_interleave(splits, 0)  # (N, 3 C, codes)
        grads = torch.empty_like(logits)
        first = 0
        for z, is_code in _chunks(logits, code, ctx.codes):
            p = F.softmax(z, 1)
            grad_p, grad_square, grad_log_p = (per_code @ is_code).chunk(3, 1)  # each (N, C, v)
            # dp_k/dz_c = p_k (1[k=c] - p_c) and dlog p_k/dz_c = 1[k=c] - p_c
            pull = grad_p.addcmul_(p, grad_square, value=2).mul_(p).add_(grad_log_p)
            grads[..., first : first + z.shape[2]] = pull.addcmul_(p, pull.sum(1, keepdim=True), value=-1)
            first += z.shape[2]
        return _join(grads, splits), None, None


def _splits(logits: Tensor) -> int:
    """Return into how many pieces of equal length the voxels (N, C, V) of a sample are cut.

    A product of 3 C + 1 rows and a few columns over a million voxels is work for a few of a GPU's multiprocessors; of
    hundreds of pieces, summed afterwards, for all of them. A CPU's cores have their chunks.
    """
    return 1 if logits.device.type == "cpu" else math.gcd(logits.shape[2], DEVICE_SPLITS)


def _split(x: Tensor, splits: int) -> Tensor:
    """Make pieces of samples: (N, ..., V) to (N * splits, ..., V / splits)."""
    return x if splits == 1 else x.unflatten(-1, (splits, -1)).movedim(-2, 1).flatten(0, 1)


def _join(x: Tensor, splits: int) -> Tensor:
    """Undo _split()."""
    return x if splits == 1 else x.unflatten(0, (-1, splits)).movedim(1, -2).flatten(-2)


def _chunks(logits: Tensor, code: Tensor, codes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits (N, C, v), float32 at least, and with them one row a code: 1 where a voxel has it (N, codes, v).

    The rows are overwritten by the next ones.
    """
    rows = 3 * logits.shape[1] + 1 + codes
    voxels = CORE_CHUNK * torch.get_num_threads() if logits.device.type == "cpu" else DEVICE_NUMBERS // rows
    length = min(max(1, voxels // (len(logits) * ranks.count())), logits.shape[2])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    numbers = torch.arange(codes, dtype=dtype, device=code.device)[:, None]
    rows = numbers.new_empty(len(logits), codes, length)
    for z, c in zip(logits.split(length, 2), code.split(length, 1), strict=True):
        # Comparing floats into floats is many times as fast as into bools that are then converted.
        yield z.to(dtype), torch.eq(c[:, None].to(dtype), numbers, out=rows[..., : z.shape[2]])


def _check_shapes(
    logits: Tensor, image_label: Tensor, patch_label: Tensor, mask: Tensor | None, where: Tensor | None, dice: str
) -> None:
    """Raise ValueError where the arguments of mixed_losses do not fit each other."""
    if dice not in DICE_SMOOTH:
        raise ValueError(f"unknown kind of Dice {dice!r}: choose 'sample' or 'batch'")
    expected = (logits.shape[0], *logits.shape[2:])
    for name, label in (("image_label", image_label), ("patch_label", patch_label)):
        if label.is_floating_point() or label.is_complex():
            raise ValueError(f"{name} is of the type {label.dtype}, it needs whole numbers: the classes")
    for name, tensor in (("image_label", image_label), ("patch_label", patch_label), ("discrepancy", where)):
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, the logits need {expected}")
    if mask is not None and tuple(mask.shape) not in (expected, expected[1:]):
        raise ValueError(f"mask has the shape {tuple(mask.shape)}, the logits need {expected[1:]} or {expected}")
