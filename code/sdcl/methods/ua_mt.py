"""UA-MT: a mean teacher whose consistency counts where it is sure (Yu et al., MICCAI 2019; docs/methods.md)."""

import math

import torch
from torch import Tensor

from sdcl import ranks
from sdcl.consistency import exact, move_teacher, noisy, risen, see_noise
from sdcl.methods import Method
from sdcl.steps import (
    TEACHER,
    Batch,
    Learners,
    Losses,
    Settings,
    add_up,
    autocast,
    clear_gradients,
    descend,
    set_aside,
    supervised_step,
)


@torch.no_grad()
def entropy_of(teacher: torch.nn.Module, images: Tensor, settings: Settings) -> Tensor:
    """Return the entropy (N, *S), in nats, of the teacher's mean probabilities over passes with dropout and noise.

    Args:
        teacher: in train mode, so that its dropout is on.
        images: (N, 1, *S).
        settings: reads passes, noise, precision.
    """
    total: Tensor | float = 0.0
    for _ in range(settings.passes):
        with autocast(images.device, settings.precision):
            logits = teacher(noisy(images, settings.noise))
        total = total + torch.softmax(exact(logits), 1)
    mean = total / settings.passes
    return -torch.xlogy(mean, mean).sum(1)


def self_train_step(learners: Learners, batch: Batch, mask: Tensor, settings: Settings) -> Losses:
    """Train student a once on labelled images, and to agree with the teacher where that is sure; move the teacher.

    Args:
        learners: changed in place; has a teacher.
        batch: as in mixed_step().
        mask: unused: nothing is pasted.
        settings: reads consistency_weight, rampup, noise, passes, the EMA's settings, dice and precision.

    Returns:
        "student_a/loss", "/dice", "/ce", "/consistency" (unweighted), "/grad_norm", and "sure", the number of voxels
        where the teacher is.

    Source: docs/methods.md, "UA-MT".
    """
    student, teacher = learners.networks["student_a"], learners.networks[TEACHER]
    rise = risen(learners, settings)
    clear_gradients(learners)
    named = supervised_step(learners, batch, settings)
    names, targets, sure = ("u_a", "u_b"), {}, {}
    for name in names:  # the mask of both batches comes first: its size is the denominator
        with torch.no_grad(), see_noise(learners, settings):
            with autocast(mask.device, settings.precision):
                logits = teacher(noisy(batch[name], settings.noise))
            targets[name] = torch.softmax(exact(logits), 1)
            entropy = entropy_of(teacher, batch[name], settings)
        sure[name] = entropy < (0.75 + 0.25 * rise) * math.log(targets[name].shape[1])
    count = ranks.total(sum(sure[name].sum() for name in names))
    for name in names:
        set_aside(learners)
        with see_noise(learners, settings), autocast(mask.device, settings.precision):
            logits = student(noisy(batch[name], settings.noise))
        difference = torch.softmax(exact(logits), 1) - targets[name]
        consistency = ranks.total((difference.square().sum(1) * sure[name]).sum()) / (2 * count + 1e-16)
        loss = settings.consistency_weight * rise * consistency
        loss.backward()
        add_up(named, {"student_a/consistency": consistency.detach(), "student_a/loss": loss.detach()})
    named |= {"sure": count} | descend(learners, named)
    move_teacher(learners, settings)
    return named


METHOD = Method(
    name="ua_mt",
    title="UA-MT: a mean teacher whose consistency counts where it is sure",
    students=("student_a",),
    predictors={"teacher": ("teacher",), "student_a": ("student_a",)},
    self_train_step=self_train_step,
    parts=("dice", "ce", "consistency"),
    totals=("sure",),
    reads=("consistency_weight", "rampup", "noise", "passes", "teacher_dropout", "ema_decay", "ema_buffers"),
    spans_ranks=True,
    passes="4 (2 + 16)",
)
