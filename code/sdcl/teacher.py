"""The teacher: an exponential moving average (EMA) of the first student."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


@torch.no_grad()
def update_teacher(
    teacher: nn.Module, student: nn.Module, decay: float, buffers: bool, halted: Tensor | None = None
) -> None:
    """Move the teacher towards the student, in place: teacher = decay * teacher + (1 - decay) * student.

    Args:
        teacher: network to change.
        student: network of the same architecture.
        decay: in [0, 1]; 0.99 in the published runs.
        buffers: also average the buffers (BatchNorm's statistics); integer buffers are rounded down.
        halted: () on the device; where it is 1 the teacher stays as it is, whatever the student holds.

    Source: docs/method.md, "Stage 2", step 6.
    """
    average = get_ema_multi_avg_fn(decay)
    ours, theirs = list(teacher.parameters()), list(student.parameters())
    if buffers:
        pairs = list(zip(teacher.buffers(), student.buffers(), strict=True))
        for buffer, source in pairs:
            if not buffer.is_floating_point():
                buffer.copy_(decay * buffer + (1 - decay) * source)  # copying to an integer rounds down
        ours += [buffer for buffer, _ in pairs if buffer.is_floating_point()]
        theirs += [source for _, source in pairs if source.is_floating_point()]
    if halted is not None:
        is_halted = halted > 0
        theirs = [torch.where(is_halted, mine, its) for mine, its in zip(ours, theirs, strict=True)]
    average(ours, theirs, None)


def growing_decay(iteration: int, decay: float) -> float:
    """Return min(1 - 1 / (t + 1), decay), an EMA's decay that forgets its start.

    Args:
        iteration: t, iterations of self-training that are done.
        decay: the largest.

    Source: Tarvainen and Valpola, NeurIPS 2017; docs/methods.md.
    """
    return min(1 - 1 / (iteration + 1), decay)
