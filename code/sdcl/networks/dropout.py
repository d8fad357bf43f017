"""Dropout that draws its random numbers fast on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes a number to the integers of that width
BITS = 15  # that decide on an element


class Dropout(nn.Dropout):
    """nn.Dropout: each element becomes 0 with probability p, the others are divided by 1 - p.

    On a CPU PyTorch draws one random number after the other, a tenth of an ACDC step in bf16; here one draw of 64 bits
    serves four elements, so p is rounded to a multiple of 2**-15.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, *S) to the same shape."""
        if x.device.type != "cpu" or not self.training or self.p in (0, 1) or torch.compiler.is_compiling():
            return super().forward(x)
        return _Drop.apply(x, self.p)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        """Map x (*S) to the same shape, with new zeros."""
        dropped = round(p * 2**BITS)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        numbers = words.view(torch.int16).as_strided(x.shape, torch.empty_like(x).stride())  # x's memory layout
        # Uniform in [-2**14, 2**14), so that the sum is negative with probability 1 - p: -1, all bits set; else 0.
        keep = numbers.bitwise_right_shift_(1).add_(dropped - 2**14).bitwise_right_shift_(15)
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - dropped / 2**BITS)
        return _kept(x, keep, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Map the output's gradient (*S) to the input's."""
        return _kept(grad, *ctx.saved_tensors, ctx.scale), None


def _kept(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    """Keep the elements whose mask has all bits set, scaled, and make the others 0."""
    integer = INTEGERS[x.element_size()]
    return (x.view(integer) & keep.to(integer)).view(x.dtype).mul_(scale)
