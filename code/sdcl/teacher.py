"""The teacher: an exponential moving average (EMA) of the first student."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sdcl.ranks import in_memory_order


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
        halted: () on the device; where it is 1 the teacher's numbers stay (but for integer buffers), whatever the
            student holds.

    Source: docs/method.md, "Stage 2", step 6.
    """
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    if buffers:
        pairs += zip(teacher.buffers(), student.buffers(), strict=True)
    # All tensors of a type as one, a few launches on a GPU instead of one or more a tensor.
    by_type: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for ours, theirs in pairs:
        in_order = theirs if theirs.stride() == ours.stride() else torch.empty_like(ours).copy_(theirs)
        by_type.setdefault(ours.dtype, []).append((in_memory_order(ours), in_memory_order(in_order)))
    for dtype, same in by_type.items():
        ours, theirs = (list(tensors) for tensors in zip(*same, strict=True))
        lengths = [len(x) for x in ours]
        if not dtype.is_floating_point:
            moved = (decay * torch.cat(ours) + (1 - decay) * torch.cat(theirs)).to(dtype)  # an integer is rounded down
            torch._foreach_copy_(ours, list(moved.split(lengths)))
            continue
        if halted is not None:
            theirs = list(torch.where(halted > 0, torch.cat(ours), torch.cat(theirs)).split(lengths))
        get_ema_multi_avg_fn(decay)(ours, theirs, None)


def growing_decay(iteration: int, decay: float) -> float:
    """Return min(1 - 1 / (t + 1), decay), an EMA's decay that forgets its start.

    Args:
        iteration: t, iterations of self-training that are done.
        decay: the largest.

    Source: Tarvainen and Valpola, NeurIPS 2017; docs/methods.md.
    """
    return min(1 - 1 / (iteration + 1), decay)
