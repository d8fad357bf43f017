"""The losses of one mixed batch: Dice, cross-entropy, and the two that act on the students' discrepancy."""

import functools
import math
from collections.abc import Iterator, Sequence
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
# many that these are at most so many numbers, 512 MiB.
CORE_CHUNK, DEVICE_NUMBERS = 2**15, 2**27
DEVICE_SPLITS = 256  # pieces of a sample whose sums other devices than a CPU take side by side
# Log-probabilities are no lower in the sums, since 0 voxels of -inf are nan; a sum beyond the other is infinite in the
# losses. No sum overflows between both: what overflows would be nan in the products.
LEAST_LOG_P, INFINITE = -1e25, 1e20


def class_map(scores: Tensor) -> Tensor:
    """Return the class of the highest score at each voxel, the first of equal ones.

    What argmax over the classes says, in bytes instead of int64, and on a CPU ten times as fast: argmax strides over
    the classes voxel by voxel, this reads one class after the other. Elsewhere argmax is one kernel, and asked.

    Args:
        scores: logits or probabilities (N, C, *S).

    Returns:
        uint8 (N, *S), of more than 256 classes int32; without gradient.
    """
    return _decided(scores).to(_label_dtype(scores.shape[1]))


def _label_dtype(count: int) -> torch.dtype:
    """Return the type of the numbers below a count: bytes while these can hold them."""
    return torch.uint8 if count <= 256 else torch.int32


def _decided(scores: Tensor) -> Tensor:
    """Return class_map(), to be compared: elsewhere than on a CPU as argmax has it, without a kernel that converts."""
    if scores.device.type != "cpu":
        return scores.detach().argmax(1)
    highest, *others = scores.detach().unbind(1)
    dtype = _label_dtype(scores.shape[1])
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

    Raises:
        ValueError: the students differ in shape or device.

    Source: docs/method.md, "Stage 2", step 4.
    """
    _check_students((logits_a, logits_b))
    return _decided(logits_a) != _decided(logits_b)


def mixed_losses(
    logits: Tensor | Sequence[Tensor],
    image_label: Tensor,
    patch_label: Tensor,
    mask: Tensor | None,
    *,
    image_weight: float,
    patch_weight: float,
    dice: DiceOver,
    discrepancy: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute the four losses of one student, or of several at once, on one mixed batch, from one log-softmax.

    Args:
        logits: (N, C, *S), any float dtype; or a sequence of such, one a student, whose losses then take a GPU as many
            launches as those of one.
        image_label: (N, *S), integer classes; the target where the mask is 1.
        patch_label: (N, *S), the target where the mask is 0.
        mask: (*S) or (N, *S), bool or 0/1; None: the image's region is the whole batch.
        image_weight: weight of the region where the mask is 1.
        patch_weight: weight of the region where the mask is 0.
        dice: "sample" (Dice3D: sums per sample and class) or "batch" (Dice2D: sums over the whole batch, squared
            probabilities in the denominator).
        discrepancy: bool or 0/1 (N, *S), where the students disagree; None: "mse" and "kl" are 0.

    Returns:
        Scalars, of a sequence tensors (K) that are views of one; in float32, of float64 logits in float64: "dice" and
        "ce", each the weighted sum over the two regions; "mse", the pull to the target where the students disagree;
        "kl", the entropy raised where they disagree and this one is wrong. None of them carries its loss weight.

    Raises:
        ValueError: the shapes do not fit each other, labels are no integers, or the kind of Dice is unknown; there is
            no student, or they differ in shape or device.
        RuntimeError: a label lies outside the classes (on a GPU later, at the next call that waits for it).

    Where torch.distributed has a group, each process gives its own samples, as many as every other. The losses are then
    those of the whole batch on each of them, and backward() gives the part of the own samples: add the gradients up
    (ranks.add_gradients(); a mean, such as DistributedDataParallel's, is too small by the number of processes).

    Matrix products need whole float32, PyTorch's default: in TF32 (torch.backends.cuda.matmul.allow_tf32, which the
    training scripts never set) the losses are right to three digits alone.

    Source: docs/method.md, "Losses of one mixed batch".
    """
    students = (logits,) if isinstance(logits, Tensor) else tuple(logits)
    _check_students(students)
    _check_shapes(students[0], image_label, patch_label, mask, discrepancy, dice)
    z = students[0] if len(students) == 1 else torch.cat(students)  # (K * N, C, *S)
    with torch.autocast(z.device.type, enabled=False):  # sums stay in float32
        code, states = _codes(z, image_label, patch_label, mask, discrepancy)
        sums = _CodeSums.apply(z.flatten(2), code.flatten(1), len(REGIONS) * states * z.shape[1])
        sums = ranks.gather(sums.unflatten(0, (len(students), -1)).movedim(0, 1))  # of the whole batch
        sums = sums.unflatten(3, (len(REGIONS), states, z.shape[1]))  # (N, K, 3 C + 1, region, state, target)
        losses = _LossesOfSums.apply(sums, (image_weight, patch_weight), dice).unbind(1)  # (K) each
        if isinstance(logits, Tensor):
            losses = [loss.squeeze(0).clone() for loss in losses]  # no views of each other
        return dict(zip(LOSSES, losses, strict=True))


def _codes(
    logits: Tensor, image_label: Tensor, patch_label: Tensor, mask: Tensor | None, discrepancy: Tensor | None
) -> tuple[Tensor, int]:
    """Say all that the losses ask of a voxel beside its probabilities in one number: (region, state, target).

    The logits (K * N, C, *S) are of K students; labels, mask and discrepancy are the same for each. The region is 0
    where the mask is 1 and else 1; the state 0 where the students agree, 1 where they disagree and this one is right, 2
    where it is wrong.

    Returns:
        (K * N, *S), uint8 while that can count them all, and the number of states: 1 without a discrepancy, else 3.
    """
    classes, states = logits.shape[1], 1 if discrepancy is None else 3
    dtype = _label_dtype(len(REGIONS) * states * classes)
    for label in (image_label, patch_label):
        if label.dtype != torch.uint8:  # bytes would hide what is wrong with others
            torch._assert_async(((label >= 0) & (label < classes)).all(), f"labels must lie in [0, {classes})")
    target = image_label.to(dtype)
    if mask is None:
        code = target.clone()  # waits for the backward pass, whatever the caller does to the labels
    else:
        inside = mask.bool()
        target = torch.where(inside, target, patch_label.to(dtype))
        code = torch.add(target, ~inside, alpha=states * classes)
    torch._assert_async(target.max() < classes, f"labels must lie in [0, {classes})")  # waits for no GPU
    if discrepancy is not None:
        disagree = discrepancy.bool()  # of 0 and 255 too
        wrong = disagree & (_decided(logits).unflatten(0, (-1, len(target))) != target)  # (K, N, *S)
        code = torch.add(torch.add(code, disagree, alpha=classes), wrong, alpha=classes)
    return code.expand(len(logits) // len(target), *target.shape).flatten(0, 1), states


class _LossesOfSums(torch.autograd.Function):
    """Compute the losses from the sums over the voxels of each sample, student, region, state and target.

    All of it is a few numbers, each kernel of which costs a GPU's launch. So what the losses add up, all of which is
    linear, is one product with a table, and what is left are quotients.
    """

    @staticmethod
    def forward(ctx: Any, sums: Tensor, weights: tuple[float, float], dice: DiceOver) -> Tensor:
        """Map sums (N, K, 3 C + 1, 2, 1 or 3, C), of p, p^2 and log p of each class and the count, to LOSSES (K, 4).

        Args:
            ctx: keeps what backward() needs.
            sums: over the voxels of each (sample, student, region, state, target).
            weights: of the two regions.
            dice: see mixed_losses().
        """
        classes = sums.shape[-1]
        of_classes = sums[:, :, :-1].unflatten(2, (3, classes))  # (N, K, 3, class, region, state, target)
        read = [of_classes.diagonal(dim1=3, dim2=6), of_classes.sum(3), of_classes.sum((5, 6)), sums[:, :, -1]]
        table = _table(classes, sums.shape[-2], dice, sums.dtype, sums.device)
        weight = _pair(float(weights[0]), float(weights[1]), sums.dtype, sums.device)  # (region)
        x = torch.cat([part.flatten(2) for part in read], 2) @ table  # (N, K, see _table())
        total = x.sum(0, keepdim=True)
        # (N or 1, K, region, class)
        of_dice = 2 * len(REGIONS) * classes  # columns
        doubled, size = _halves((x if dice == "sample" else total)[..., :of_dice] + DICE_SMOOTH[dice], classes)
        overlap = doubled / size
        dice_loss = 1 - overlap.mean((0, 3))  # (K, region)
        sums_of, voxels = _halves(total[0, :, of_dice:], 3)  # (K, region, 3)
        voxels = voxels.clamp_min(1)  # where there is none, the sum is 0 as well
        others = (sums_of / voxels).masked_fill_(sums_of > INFINITE, torch.inf)
        ctx.save_for_backward(table, weight, overlap, size, voxels)
        ctx.shape = sums.shape
        return weight @ torch.cat([dice_loss[..., None], others], 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor, None, None]:
        """Map the losses' gradients to the sums': 0 to counts, which no logit moves; of infinite ones as if finite."""
        table, weight, overlap, size, voxels = ctx.saved_tensors
        classes, (regions, states, targets) = size.shape[-1], ctx.shape[3:]
        of_regions = grads[:, None] * weight[:, None]  # (K, region, 4)
        of_doubled = of_regions[:, :, :1] / (size * -(len(size) * classes))  # (N or 1, K, region, class)
        of_size = -of_doubled * overlap
        of_others = (of_regions[:, :, 1:] / voxels).expand(len(size), -1, -1, -1)
        of_x = torch.cat([part.flatten(2) for part in (of_doubled, of_size, of_others)], 2)
        of_read = of_x @ table[:, : of_x.shape[2]].mT
        result = torch.zeros(ctx.shape, dtype=size.dtype, device=size.device)
        of_classes = result[:, :, :-1].unflatten(2, (3, classes))
        of_target, over_classes, over_voxels, _ = of_read.split(_lengths(classes, states), 2)
        of_classes += over_classes.unflatten(2, (3, 1, regions, states, targets))
        of_classes += over_voxels.unflatten(2, (3, classes, regions, 1, 1))
        of_classes.diagonal(dim1=3, dim2=6).add_(of_target.unflatten(2, (3, regions, states, targets)))
        return result, None, None


def _lengths(classes: int, states: int) -> list[int]:
    """Return how many rows of _table() each of its four parts has."""
    cells = len(REGIONS) * states * classes
    return [3 * cells, 3 * cells, 3 * len(REGIONS) * classes, cells]


def _halves(x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Split (..., 2 * regions * length) in two of (..., regions, length)."""
    first, second = x.unflatten(-1, (2, len(REGIONS), length)).unbind(-3)
    return first, second


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)  # constants of every later call, whatever the first one is for
def _pair(first: float, second: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return two numbers on a device, (2), made there."""
    pair = torch.full((2,), second, dtype=dtype, device=device)
    pair[0].fill_(first)
    return pair


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _table(classes: int, states: int, dice: DiceOver, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Build the table by which what the losses add up is read off the sums.

    A row of the table is what a sample's sums give: p, p^2 and log p of the target's class by (region, state, target);
    the sums of each over the classes; of each class over states and targets, by (class, region); and the count of
    voxels by (region, state, target). A column is what the losses ask for: Dice's doubled overlaps and then its sizes,
    by (region, class); the sums of CE, MSE and KL by region, and then the voxels of each, by region.
    """
    regions = len(REGIONS)
    cells = (regions, states, classes)
    lengths = _lengths(classes, states)
    table = torch.zeros(sum(lengths), 2 * regions * (classes + 3), dtype=dtype, device=device)
    of_target, over_classes, over_voxels, count = table.split(lengths)
    of_target, over_classes = (part.unflatten(0, (3, *cells)) for part in (of_target, over_classes))
    over_voxels, count = over_voxels.unflatten(0, (3, classes, regions)), count.unflatten(0, cells)
    p, square, log_p = range(3)
    for region in range(regions):
        doubled, size = (slice(k * classes, (k + 1) * classes) for k in (region, regions + region))
        of_target[p, region, :, :, doubled].diagonal(dim1=1, dim2=2).fill_(2)
        over_voxels[p if dice == "sample" else square, :, region, size].diagonal().fill_(1)
        count[region, :, :, size].diagonal(dim1=1, dim2=2).fill_(1)

        ce, mse, kl = (2 * regions * classes + 3 * region + k for k in range(3))
        of_target[log_p, region, :, :, ce] = -1
        # mean_c (p_c - 1[t=c])^2 = (sum_c p_c^2 - 2 p_t + 1) / C, where the students disagree
        over_classes[square, region, 1:, :, mse] = 1 / classes
        of_target[p, region, 1:, :, mse] = -2 / classes
        count[region, 1:, :, mse] = 1 / classes
        over_classes[log_p, region, 2:, :, kl] = -1 / classes

        count[region, :, :, ce + 3 * regions] = 1
        count[:, 1:, :, mse + 3 * regions] = 1  # of both regions
        count[:, 2:, :, kl + 3 * regions] = 1
    return table


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
        classes, sums, splits = logits.shape[1], None, _splits(logits)
        for z, is_code in _chunks(_split(logits, splits), _split(code, splits), codes):
            features = z.new_ones(len(z), 3 * classes + 1, z.shape[2])
            p, square, log_p, _ = features.split(classes, 1)
            torch.clamp(F.log_softmax(z, 1), min=LEAST_LOG_P, out=log_p)
            torch.exp(log_p, out=p)
            torch.mul(p, p, out=square)
            found = features @ is_code.mT
            sums = found if sums is None else sums + found
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
            into = grads[..., first : first + z.shape[2]]
            torch.addcmul(pull, p, pull.sum(1, keepdim=True), value=-1, out=into)
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
    # On a CPU comparing floats into floats is many times as fast as what has to be converted.
    compared = dtype if logits.device.type == "cpu" else code.dtype
    numbers = torch.arange(codes, dtype=compared, device=code.device)[:, None]
    rows = numbers.new_empty(len(logits), codes, length, dtype=dtype)
    for z, c in zip(logits.split(length, 2), code.split(length, 1), strict=True):
        yield z.to(dtype), torch.eq(c[:, None].to(compared), numbers, out=rows[..., : z.shape[2]])


def _check_students(students: Sequence[Tensor]) -> None:
    """Raise ValueError where students' logits do not fit each other."""
    if len({(z.shape, z.device) for z in students}) != 1:
        found = ", ".join(f"{tuple(z.shape)} on {z.device}" for z in students)
        raise ValueError(f"logits need one student at least, all of one shape on one device; these are [{found}]")


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
