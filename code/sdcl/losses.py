"""The losses of one mixed batch: Dice, cross-entropy, and the two that act on the students' discrepancy."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

DiceOver = Literal["sample", "batch"]
COUNT_EPSILON = 1e-16
DICE_SMOOTH = {"sample": 1e-5, "batch": 1e-10}


def class_map(scores: Tensor) -> Tensor:
    """Return the class of the highest score at each voxel, the first of equal ones.

    What argmax over the classes says, in bytes instead of int64, and on a CPU ten times as fast: argmax strides over
    the classes voxel by voxel, this reads one class after the other.

    Args:
        scores: logits or probabilities (N, C, *S).

    Returns:
        uint8 (N, *S), without gradient.
    """
    highest, *others = scores.detach().unbind(1)
    classes = torch.zeros_like(highest, dtype=torch.uint8)
    for c, score in enumerate(others, start=1):
        classes.masked_fill_(score > highest, c)
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
        discrepancy: bool (N, *S), where the students disagree; None: "mse" and "kl" are 0.

    Returns:
        Scalars in float32: "dice" and "ce", each the weighted sum over the two regions; "mse", the pull to the target
        where the students disagree; "kl", the entropy raised where they disagree and this one is wrong. None of them
        carries its loss weight.

    Raises:
        ValueError: the shapes do not fit each other, or the kind of Dice is unknown.

    Source: docs/method.md, "Losses of one mixed batch".
    """
    _check_shapes(logits, image_label, patch_label, mask, discrepancy, dice)
    with torch.autocast(logits.device.type, enabled=False):  # reductions stay in float32
        log_p = F.log_softmax(logits.float(), dim=1)  # (N, C, *S)
        p = log_p.exp()
        inside = torch.ones_like(image_label, dtype=torch.bool) if mask is None else mask.bool().expand_as(image_label)
        target = torch.where(inside, image_label, patch_label)  # (N, *S)
        index = target.long().unsqueeze(1)
        log_p_target = log_p.gather(1, index).squeeze(1)  # (N, *S)
        p_target = p.gather(1, index).squeeze(1)
        losses = {"dice": logits.new_zeros((), dtype=torch.float32), "ce": logits.new_zeros((), dtype=torch.float32)}
        regions = [(inside, image_weight)] if mask is None else [(inside, image_weight), (~inside, patch_weight)]
        for region, weight in regions:
            losses["dice"] = losses["dice"] + weight * _region_dice(p, p_target, target, region, dice)
            losses["ce"] = losses["ce"] + weight * _masked_mean(-log_p_target, region)
        if discrepancy is None:
            return losses | {"mse": torch.zeros_like(losses["ce"]), "kl": torch.zeros_like(losses["ce"])}
        weights = torch.where(inside, float(image_weight), float(patch_weight))
        # mean_c (p_c - 1[t=c])^2 = (sum_c p_c^2 - 2 p_t + 1) / C: no one-hot tensor is needed.
        squared_error = (p.square().sum(1) - 2 * p_target + 1) / p.shape[1]
        wrong = discrepancy & (class_map(logits) != target)
        losses["mse"] = _masked_mean(weights * squared_error, discrepancy)
        losses["kl"] = _masked_mean(weights * -log_p.mean(1), wrong)
    return losses


def _masked_mean(values: Tensor, where: Tensor) -> Tensor:
    """Average values (N, *S) over the voxels of where; 0 with a zero gradient if there are none."""
    return torch.where(where, values, 0).sum() / (where.sum() + COUNT_EPSILON)


def _region_dice(p: Tensor, p_target: Tensor, target: Tensor, region: Tensor, kind: DiceOver) -> Tensor:
    """Dice loss of one region: the mean over classes (and samples, for "sample") of 1 - overlap / total.

    Args:
        p: probabilities (N, C, *S).
        p_target: probabilities of the target class (N, *S).
        target: (N, *S).
        region: bool (N, *S).
        kind: "sample" or "batch".
    """
    axes = tuple(range(1, target.ndim)) if kind == "sample" else tuple(range(target.ndim))
    overlap, size = [], []
    for c in range(p.shape[1]):
        of_class = region & (target == c)
        mass = p[:, c] if kind == "sample" else p[:, c].square()
        overlap.append(torch.where(of_class, p_target, 0).sum(axes))
        size.append(torch.where(region, mass, 0).sum(axes) + of_class.sum(axes))
    smooth = DICE_SMOOTH[kind]
    return (1 - (2 * torch.stack(overlap) + smooth) / (torch.stack(size) + smooth)).mean()


def _check_shapes(
    logits: Tensor, image_label: Tensor, patch_label: Tensor, mask: Tensor | None, where: Tensor | None, dice: str
) -> None:
    """Raise ValueError where the arguments of mixed_losses do not fit each other."""
    if dice not in DICE_SMOOTH:
        raise ValueError(f"unknown kind of Dice {dice!r}: choose 'sample' or 'batch'")
    expected = (logits.shape[0], *logits.shape[2:])
    for name, tensor in (("image_label", image_label), ("patch_label", patch_label), ("discrepancy", where)):
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, the logits need {expected}")
    if mask is not None and tuple(mask.shape) not in (expected, expected[1:]):
        raise ValueError(f"mask has the shape {tuple(mask.shape)}, the logits need {expected[1:]} or {expected}")
