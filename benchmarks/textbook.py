"""The method as a textbook writes it: one-hot tensors, a softmax for each loss, loops over regions and parameters.

The unit tests' oracle and the benchmarks' opponent; written from docs/method.md, for clarity and not for speed.
"""

from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
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


def pretrain_loss(logits: Tensor, label: Tensor, mask: Tensor, method: Any) -> dict[str, Tensor]:
    """Return "dice" and "ce" of stage 1: of each region with both weights 1, or of the mix as a whole."""
    nowhere = torch.zeros_like(label, dtype=torch.bool)
    region = mask if method.pre_dice == "regions" else torch.ones_like(mask)
    losses = mixed_losses(logits, label, label, region, 1.0, 1.0, method.dice, nowhere)
    return {name: losses[name] for name in ("dice", "ce")}


def pseudo_label(logits: Tensor, rule: str, connectivity: int) -> Tensor:
    """Return int64 labels (N, *S): the decision, and of each foreground class the largest component."""
    p = torch.softmax(logits, 1)
    decision = (p[:, 1] >= 0.5).long() if rule == "threshold" else p.argmax(1)
    steps = {4: 1, 8: 2, 6: 1, 18: 2, 26: 3}[connectivity]
    neighbours = ndimage.generate_binary_structure(decision.ndim - 1, steps)
    cleaned = np.zeros(decision.shape, np.int64)
    for sample, result in zip(decision.cpu().numpy(), cleaned, strict=True):
        for c in range(1, logits.shape[1]):
            components, count = ndimage.label(sample == c, neighbours)
            if count:
                result[components == np.bincount(components.flat)[1:].argmax() + 1] = c
    return torch.from_numpy(cleaned).to(logits.device)


def mix(image: Tensor, patch: Tensor, mask: Tensor) -> Tensor:
    """Return image * M + patch * (1 - M)."""
    m = mask.to(image.dtype)
    return image * m + patch * (1 - m)


def pretrain_step(
    students: dict[str, nn.Module], optimisers: dict[str, torch.optim.Optimizer], batch: dict[str, Tensor],
    mask: Tensor, method: Any,
) -> dict[str, float]:  # fmt: skip
    """Train both students once on a mix of two labelled batches; return "<student>/loss"."""
    image, label = mix(batch["x_a"], batch["x_b"], mask), mix(batch["y_a"].long(), batch["y_b"].long(), mask)
    values = {}
    for role, student in students.items():
        losses = pretrain_loss(student(image), label, mask, method)
        loss = (losses["dice"] + losses["ce"]) / 2
        optimisers[role].zero_grad()
        loss.backward()
        optimisers[role].step()
        values[f"{role}/loss"] = loss.item()
    return values


def self_train_step(
    students: dict[str, nn.Module], teacher: nn.Module, optimisers: dict[str, torch.optim.Optimizer],
    batch: dict[str, Tensor], mask: Tensor, method: Any,
) -> dict[str, float]:  # fmt: skip
    """Train both students once on two mixes, then move the teacher; return "<student>/loss"."""
    with torch.no_grad():
        pseudo_a, pseudo_b = (
            pseudo_label(teacher(batch[key]), method.pseudo_label_rule, method.connectivity) for key in ("u_a", "u_b")
        )
    label_a, label_b = batch["y_a"].long(), batch["y_b"].long()
    mixes = [
        (mix(batch["u_a"], batch["x_b"], mask), pseudo_a, label_b, method.u_weight, 1.0),
        (mix(batch["x_a"], batch["u_b"], mask), label_a, pseudo_b, 1.0, method.u_weight),
    ]
    logits = {role: [student(image) for image, *_ in mixes] for role, student in students.items()}
    decisions = {role: [torch.softmax(z, 1).argmax(1) for z in pair] for role, pair in logits.items()}
    disagree = [a != b for a, b in zip(*decisions.values(), strict=True)]
    values = {}
    for role in students:
        loss = 0
        for z, (_, image_label, patch_label, *weights), where in zip(logits[role], mixes, disagree, strict=True):
            losses = mixed_losses(z, image_label, patch_label, mask, *weights, method.dice, where)
            loss = loss + (losses["dice"] + losses["ce"]) / 2
            loss = loss + method.mse_weight * losses["mse"] + method.kl_weight * losses["kl"]
        optimisers[role].zero_grad()
        loss.backward()
        optimisers[role].step()
        values[f"{role}/loss"] = loss.item()
    update_teacher(teacher, students["student_a"], method.ema_decay, method.ema_buffers)
    return values


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, decay: float, buffers: bool) -> None:
    """Average parameters, and buffers if asked to, one after the other."""
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        ours.mul_(decay).add_(theirs, alpha=1 - decay)
    if buffers:
        for ours, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
            ours.copy_(decay * ours + (1 - decay) * theirs)
