"""CPS: two students, each one's decision is the other's target (Chen et al., CVPR 2021; docs/methods.md)."""

from torch import Tensor
from torch.nn import functional as F

from sdcl import ranks
from sdcl.consistency import exact, risen
from sdcl.losses import class_map
from sdcl.methods import Method
from sdcl.scoring.evaluation import PREDICTORS, STUDENTS
from sdcl.steps import (
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
    """Train both students once on labelled images, and each on the other's decisions on unlabelled ones.

    Args:
        learners: changed in place; no teacher is needed.
        batch: as in mixed_step().
        mask: unused: nothing is pasted.
        settings: reads consistency_weight, rampup, dice and precision.

    Returns:
        "<student>/loss", "/dice", "/ce", "/consistency" (unweighted), "/grad_norm".

    Source: docs/methods.md, "CPS".
    """
    weight = settings.consistency_weight * risen(learners, settings)
    clear_gradients(learners)
    named = supervised_step(learners, batch, settings)
    for images in (batch["u_a"], batch["u_b"]):
        set_aside(learners)
        with autocast(images.device, settings.precision):
            logits = {role: learners.networks[role](images) for role in learners.optimisers}
        decisions = {role: class_map(z).long() for role, z in logits.items()}
        for role, other in (("student_a", "student_b"), ("student_b", "student_a")):
            consistency = F.cross_entropy(exact(logits[role]), decisions[other]) / 2  # half of both batches' mean
            consistency = ranks.mean(consistency)
            loss = weight * consistency
            loss.backward()
            add_up(named, {f"{role}/consistency": consistency.detach(), f"{role}/loss": loss.detach()})
    return named | descend(learners, named)


METHOD = Method(
    name="cps",
    title="CPS: cross pseudo supervision, two students without a teacher",
    students=STUDENTS,
    predictors=PREDICTORS,
    self_train_step=self_train_step,
    parts=("dice", "ce", "consistency"),
    reads=("consistency_weight", "rampup"),
    spans_ranks=True,
    passes="8",
)
