"""Mean teacher: consistency with an EMA teacher on noisy inputs (Tarvainen and Valpola, 2017; docs/methods.md)."""

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


def self_train_step(learners: Learners, batch: Batch, mask: Tensor, settings: Settings) -> Losses:
    """Train student a once on labelled images, and to agree with the teacher on unlabelled ones; move the teacher.

    Args:
        learners: changed in place; has a teacher.
        batch: as in mixed_step().
        mask: unused: nothing is pasted.
        settings: reads consistency_weight, rampup, noise, the EMA's settings, dice and precision.

    Returns:
        "student_a/loss", "/dice", "/ce", "/consistency" (unweighted), "/grad_norm".

    Source: docs/methods.md, "Mean teacher".
    """
    student, teacher = learners.networks["student_a"], learners.networks[TEACHER]
    weight = settings.consistency_weight * risen(learners, settings)
    clear_gradients(learners)
    named = supervised_step(learners, batch, settings)
    for images in (batch["u_a"], batch["u_b"]):
        set_aside(learners)
        with see_noise(learners, settings), autocast(images.device, settings.precision):
            logits = student(noisy(images, settings.noise))
            with torch.no_grad():
                target = teacher(noisy(images, settings.noise))
        difference = torch.softmax(exact(logits), 1) - torch.softmax(exact(target), 1)
        consistency = ranks.mean(difference.square().mean() / 2)  # half of the mean over both batches
        loss = weight * consistency
        loss.backward()
        add_up(named, {"student_a/consistency": consistency.detach(), "student_a/loss": loss.detach()})
    named |= descend(learners, named)
    move_teacher(learners, settings)
    return named


METHOD = Method(
    name="mean_teacher",
    title="mean teacher: consistency with an EMA teacher on noisy inputs",
    students=("student_a",),
    predictors={"teacher": ("teacher",), "student_a": ("student_a",)},
    self_train_step=self_train_step,
    parts=("dice", "ce", "consistency"),
    reads=("consistency_weight", "rampup", "noise", "teacher_dropout", "ema_decay", "ema_buffers"),
    spans_ranks=True,
    passes="4 (2)",
)
