"""The method as a textbook writes it: one-hot tensors, a softmax for each loss, loops over regions.

The unit tests' oracle and the benchmarks' opponent; written from the definitions, for clarity and not for speed.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def one_hot(label: Tensor, num_classes: int) -> Tensor:
    """Return (N, C, *S) float32 from class indices (N, *S)."""
    return F.one_hot(label.long(), num_classes).movedim(-1, 1).float()


def dice_sample(logits: Tensor, label: Tensor, region: Tensor) -> Tensor:
    """Dice3D of one region (N, *S): sums per sample and class."""
    p, t = torch.softmax(logits, 1), one_hot(label, logits.shape[1])
    m = region.unsqueeze(1).float()
    axes = tuple(range(2, logits.ndim))
    overlap, total = (p * t * m).sum(axes), (p * m).sum(axes) + (t * m).sum(axes)
    return 1 - ((2 * overlap + 1e-5) / (total + 1e-5)).mean()


def dice_batch(logits: Tensor, label: Tensor, region: Tensor) -> Tensor:
    """Dice2D of one region (N, *S): sums over the whole batch, squared probabilities."""
    p, t = torch.softmax(logits, 1), one_hot(label, logits.shape[1])
    m = region.unsqueeze(1).float()
    axes = (0, *range(2, logits.ndim))
    overlap, total = (p * t * m).sum(axes), (p * p * m).sum(axes) + (t * m).sum(axes)
    return (1 - (2 * overlap + 1e-10) / (total + 1e-10)).mean()


def cross_entropy(logits: Tensor, label: Tensor, region: Tensor) -> Tensor:
    """Mean cross-entropy over the voxels of a region (N, *S)."""
    values = F.cross_entropy(logits, label.long(), reduction="none")
    return (values * region).sum() / (region.sum() + 1e-16)


def mixed_losses(
    logits: Tensor, image_label: Tensor, patch_label: Tensor, mask: Tensor, image_weight: float, patch_weight: float,
    dice: str, discrepancy: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """Return "dice", "ce", "mse", "kl" of one mixed batch; arguments as in sdcl.losses.mixed_losses."""
    image = mask.bool().expand_as(image_label).float()
    patch = 1 - image
    region_dice = {"sample": dice_sample, "batch": dice_batch}[dice]
    losses = {
        name: image_weight * loss(logits, image_label, image) + patch_weight * loss(logits, patch_label, patch)
        for name, loss in (("dice", region_dice), ("ce", cross_entropy))
    }
    prediction = torch.softmax(logits, 1).argmax(1)
    losses["mse"] = losses["kl"] = 0
    count = wrong_count = 0
    for label, region, weight in ((image_label, image, image_weight), (patch_label, patch, patch_weight)):
        where = discrepancy.float() * region
        wrong = where * (prediction != label)
        error = (torch.softmax(logits, 1) - one_hot(label, logits.shape[1])).square().mean(1)
        entropy = -torch.log_softmax(logits, 1).mean(1)
        losses["mse"] = losses["mse"] + weight * (where * error).sum()
        losses["kl"] = losses["kl"] + weight * (wrong * entropy).sum()
        count, wrong_count = count + where.sum(), wrong_count + wrong.sum()
    losses["mse"] = losses["mse"] / (count + 1e-16)
    losses["kl"] = losses["kl"] / (wrong_count + 1e-16)
    return losses
