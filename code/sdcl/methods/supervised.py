"""Labelled images alone, for as many updates as the other methods have (docs/methods.md)."""

from torch import Tensor

from sdcl.methods import Method
from sdcl.steps import Batch, Learners, Losses, Settings, clear_gradients, descend, pretrain_step, supervised_step


def self_train_step(learners: Learners, batch: Batch, mask: Tensor, settings: Settings) -> Losses:
    """Go on with stage 1's step; without pasting, learn from x_a and x_b as they are, half each."""
    if settings.paste == "yes":
        return pretrain_step(learners, batch, mask, settings)
    clear_gradients(learners)
    named = supervised_step(learners, batch, settings)
    return named | descend(learners, named)


METHOD = Method(
    name="supervised",
    title="supervised: labelled images alone, for as many updates",
    students=("student_a",),
    predictors={"student_a": ("student_a",)},
    self_train_step=self_train_step,
    reads=("paste", "mask_fraction"),
    spans_ranks=True,
    passes="1, without pasting 2",
    needs_unlabelled=False,
)
