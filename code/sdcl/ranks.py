"""One step over several processes: what losses, norms and steps exchange while torch.distributed has a group.

Each process (rank) holds its own samples of the batch, as many as every other. Losses and statistics are those of the
whole batch, on every rank; a rank's backward pass gives the part of its own samples, and add_gradients() adds the parts
up, once a step. Without a group, or with one process, all of this returns what it is given.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def count() -> int:
    """Return the number of processes that share a batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's place among them, from 0."""
    return dist.get_rank() if count() > 1 else 0


def gather(x: Tensor) -> Tensor:
    """Put the ranks' tensors one after the other along the first axis.

    Args:
        x: (n, ...), of the same shape on every rank.

    Returns:
        (ranks * n, ...), in the ranks' order; the gradient of the own part reaches x.
    """
    return _Gather.apply(x) if count() > 1 else x


def total(x: Tensor) -> Tensor:
    """Add up the ranks' tensors, of one shape; the gradient reaches x as it is, since each rank's x is its own part."""
    return _Total.apply(x) if count() > 1 else x


def mean(x: Tensor) -> Tensor:
    """Return the mean over the batch of a loss that is a mean over each rank's samples; see total()."""
    return total(x / count()) if count() > 1 else x


@torch.no_grad()
def add_gradients(parameters: Iterable[Tensor]) -> None:
    """Add up the ranks' gradients in place, in one reduction for each type of number; None is left alone."""
    if count() == 1:
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for gradient in (p.grad for p in parameters if p.grad is not None):
        by_type.setdefault(gradient.dtype, []).append(gradient)
    for gradients in by_type.values():
        # In each one's own memory order, which is the same on all ranks: no copy is laid out anew.
        flat = torch.cat([in_memory_order(gradient) for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_([in_memory_order(gradient) for gradient in gradients], list(parts))


def in_memory_order(x: Tensor) -> Tensor:
    """Return a tensor's numbers as they lie in memory, a view (numel,).

    Raises:
        ValueError: there are gaps between them, or one stands for several.
    """
    step = 1  # between neighbours along the axis that comes next in memory
    for stride, side in sorted((stride, side) for stride, side in zip(x.stride(), x.shape, strict=True) if side > 1):
        if stride != step:
            break
        step *= side
    if step != x.numel():
        raise ValueError(f"a tensor of the shape {tuple(x.shape)} and strides {x.stride()} is not one piece of memory")
    return x.as_strided((x.numel(),), (1,))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(count())]
        dist.all_gather(parts, x.contiguous())
        ctx.length = len(x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.narrow(0, rank() * ctx.length, ctx.length)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = x.clone()
        dist.all_reduce(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
