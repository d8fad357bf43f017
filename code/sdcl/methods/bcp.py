"""BCP: one student on an EMA teacher's copy-paste, both ways (Bai et al., CVPR 2023; docs/methods.md)."""

from torch import Tensor

from sdcl.methods import Method
from sdcl.steps import Batch, Learners, Losses, Settings, mixed_step


def self_train_step(learners: Learners, batch: Batch, mask: Tensor, settings: Settings) -> Losses:
    """Train student a once on both mixes, without corrections; see mixed_step()."""
    return mixed_step(learners, batch, mask, settings, lambda _: None)


METHOD = Method(
    name="bcp",
    title="BCP: bidirectional copy-paste, one student and its EMA teacher",
    students=("student_a",),
    predictors={"teacher": ("teacher",), "student_a": ("student_a",)},
    self_train_step=self_train_step,
    reads=("mask_fraction", "u_weight", "pseudo_label_rule", "connectivity", "largest_component", "teacher_dropout",
           "ema_decay", "ema_buffers", "ema_warmup"),
    spans_ranks=True,
    passes="2 (2)",
)  # fmt: skip
