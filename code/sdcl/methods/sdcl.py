"""SDCL: two students, a teacher, and corrections where the students disagree (MICCAI 2024; docs/method.md)."""

import torch
from torch import Tensor

from sdcl.losses import discrepancy
from sdcl.methods import Method
from sdcl.scoring.evaluation import PREDICTORS, STUDENTS
from sdcl.steps import Batch, Learners, Losses, Settings, mixed_step


def self_train_step(learners: Learners, batch: Batch, mask: Tensor, settings: Settings) -> Losses:
    """Train both students once on both mixes, with the corrections where `correct` says; see mixed_step().

    Source: docs/method.md, "Stage 2"; "everywhere" and "none" are ablations.
    """

    def where(logits: dict[str, Tensor]) -> Tensor | None:
        disagree = discrepancy(*logits.values())
        return torch.ones_like(disagree) if settings.correct == "everywhere" else disagree

    return mixed_step(learners, batch, mask, settings, (lambda _: None) if settings.correct == "none" else where)


METHOD = Method(
    name="sdcl",
    title="SDCL: two students corrected where they disagree, by an EMA teacher's copy-paste",
    students=STUDENTS,
    predictors=PREDICTORS,
    self_train_step=self_train_step,
    parts=("dice", "ce", "mse", "kl"),
    totals=("discrepancy",),
    reads=("correct", "mse_weight", "kl_weight", "mask_fraction", "u_weight", "pseudo_label_rule", "connectivity",
           "largest_component", "teacher_dropout", "ema_decay", "ema_buffers", "ema_warmup"),
    spans_ranks=True,
    passes="4 (2)",
)  # fmt: skip
