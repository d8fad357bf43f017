"""PyTorch's layers where a CPU or GPU does them slowly or inexactly: the same functions, parameters and buffers."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sdcl import ranks

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes a number to the integers of that width
BITS = 15  # that decide on an element
SHORTEST_BF16 = 2  # up to this first spatial side 3D convolutions compute in float32 on a CPU
ROW = 1024  # numbers that BatchNorm sums side by side
PIECES = 64  # at most so many of a channel are summed side by side on a GPU
LARGE = 2**16  # voxels of a channel from which on that pays


def every_second(x: Tensor) -> Tensor:
    """Return every second element along each spatial axis, the first one included: (N, C, *S) to (N, C, *ceil(S / 2)).

    What a convolution of width 1 and stride 2 looks at. The mean over one pixel is that pixel; its backward pass is
    several times as fast as a slice's in channels last, and slower than it in 3D.
    """
    return F.avg_pool2d(x, 1, 2) if x.ndim == 4 else x[..., ::2, ::2, ::2].contiguous()


class Conv3d(nn.Conv3d):
    """nn.Conv3d, in float32 where bfloat16 on a CPU is wrong.

    The gradient of its weights comes from memory that nobody wrote where the kernel is 3 wide, the stride 1, and the
    first spatial side is 2 (oneDNN in PyTorch 2.13, with AVX-512): as a patch of 32 voxels gives at the deepest stage.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, *S) to (N, out_channels, *S / stride)."""
        if x.device.type != "cpu" or x.shape[2] > SHORTEST_BF16 or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class InstanceNorm(nn.InstanceNorm3d):
    """Each sample's channel gets mean 0 and variance 1, without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, *S) to the same shape."""
        # A group norm of single channels is the same and PyTorch's is four times as fast on a CPU. On a GPU what
        # instance_norm returns is a view, so that what changes it in place is copied in the backward pass; and autocast
        # turns group_norm, but not native_group_norm, into float32.
        x, (n, channels) = x.contiguous(), x.shape[:2]
        size = x.numel() // (n * channels)
        if x.is_cuda and size >= LARGE and not torch.compiler.is_compiling():
            return _NormaliseInPieces.apply(x, math.gcd(size, PIECES), self.eps)
        return torch.native_group_norm(x, None, None, n, channels, size, channels, self.eps)[0]


class _NormaliseInPieces(torch.autograd.Function):
    """InstanceNorm of few large channels on a GPU, where PyTorch's has one block of threads a channel.

    A channel's pieces are looked at as if each were a channel, by what SyncBatchNorm does with those of several GPUs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, pieces: int, eps: float) -> Tensor:
        """Normalise x (N, C, *S), contiguous."""
        n, channels = x.shape[:2]
        cut = x.view(1, n * channels * pieces, -1)
        mean, inverse = torch.batch_norm_stats(cut, eps)
        counts = mean.new_full((pieces,), cut.shape[2])
        found = (values.view(-1, pieces).t() for values in (mean, inverse))
        both = torch.batch_norm_gather_stats_with_counts(mean, *found, None, None, 0.0, eps, counts)
        mean, inverse = (values.repeat_interleave(pieces) for values in both)
        ctx.save_for_backward(x, mean, inverse)
        ctx.pieces = pieces
        normal = torch.batch_norm_elemt(cut, None, None, mean, inverse, eps)
        return torch.ops.aten._unsafe_view(normal, x.shape)  # no view, so that a ReLU may work in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Map the output's gradient (N, C, *S) to the input's."""
        x, mean, inverse = ctx.saved_tensors
        cut = x.view(1, len(mean), -1)
        pull = grad.contiguous().view(cut.shape)
        sums = torch.batch_norm_backward_reduce(pull, cut, mean, inverse, None, True, False, False)[:2]
        sums = (values.view(-1, ctx.pieces).sum(1).repeat_interleave(ctx.pieces) for values in sums)
        count = torch.full((1,), ctx.pieces * cut.shape[2], dtype=torch.int32, device=x.device)
        to_x = torch.batch_norm_backward_elemt(pull, cut, mean, inverse, None, *sums, count)
        return to_x.view(x.shape), None, None


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d: each channel gets mean 0 and variance 1 over the batch's pixels, then a weight and a bias.

    In channels last on a CPU PyTorch adds up a channel's pixels one after the other in float32: of 786,432 of them the
    standard deviation comes 1e-4 off. Here several pixels' channels are looked at side by side, as if each were a
    channel of its own, and their statistics put together: to 1e-6, and faster where channels are few. Where several
    processes share a batch, the statistics are those of all of it. It has first derivatives only.

    Args:
        width: number of channels C.
    """

    def __init__(self, width: int):
        super().__init__(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        is_ours = x.device.type == "cpu" and self.training and not torch.compiler.is_compiling()
        if is_ours and ranks.count() > 1:
            x = x.contiguous(memory_format=torch.channels_last)
        if not is_ours or not x.is_contiguous(memory_format=torch.channels_last) or x.numel() <= x.shape[1]:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        return _Normalise.apply(x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float,
        eps: float,
    ) -> Tensor:  # fmt: skip
        """Normalise x (N, C, H, W) and move the running statistics."""
        count, (n, channels, height, width) = ranks.count() * x.numel() // x.shape[1], x.shape
        beside = math.gcd(height * width, max(1, ROW // channels))
        rows = x.permute(0, 2, 3, 1).reshape(n, -1, 1, beside * channels).permute(0, 3, 1, 2)  # a view
        unmoved = running_mean.new_zeros(rows.shape[1])  # by momentum 0; it says in which type the statistics come
        means, variances = torch.batch_norm_update_stats(rows, unmoved, unmoved, 0.0)
        means, variances = (ranks.gather(m.view(beside, channels)) for m in (means, variances))
        mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (count / (count - 1)), momentum)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps))
        ctx.eps = eps
        return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Map the output's gradient (N, C, H, W) to those of x, weight and bias."""
        x, weight, mean, inverse = ctx.saved_tensors
        if ranks.count() > 1:
            return *_shared_backward(grad, x, weight, mean, inverse), None, None, None, None
        grads = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse, True, ctx.eps, [True] * 3
        )
        return *grads, None, None, None, None


def _shared_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias where the mean and 1 / deviation (C) are of all ranks' samples."""

    def wide(values: Tensor) -> Tensor:
        return values[None, :, None, None]

    exact = torch.promote_types(x.dtype, weight.dtype)
    normal, pull = (x.to(exact) - wide(mean)) * wide(inverse), grad.to(exact)
    # Of the own samples: add_gradients() adds the others'.
    to_bias, to_weight = pull.sum((0, 2, 3)), (pull * normal).sum((0, 2, 3))
    count = ranks.count() * x.numel() // x.shape[1]
    shared = ranks.total(torch.stack([to_bias, to_weight])) / count
    to_x = (pull - wide(shared[0]) - normal * wide(shared[1])) * wide(weight * inverse)
    return to_x.to(x.dtype), to_weight, to_bias


class Dropout(nn.Dropout):
    """nn.Dropout: each element becomes 0 with probability p, the others are divided by 1 - p.

    On a CPU PyTorch draws one random number after the other, a tenth of an ACDC step in bf16; here one draw of 64 bits
    serves four elements, so p is rounded to a multiple of 2**-15. A nan that is dropped becomes 0. It has first
    derivatives only.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, *S) to the same shape."""
        dropped = round(self.p * 2**BITS)
        is_ours = x.device.type == "cpu" and self.training and not torch.compiler.is_compiling() and not self.inplace
        return _Drop.apply(x, dropped) if is_ours and 0 < dropped < 2**BITS else super().forward(x)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int) -> Tensor:
        """Map x (*S) to the same shape, with new zeros of probability dropped / 2**BITS."""
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        numbers = words.view(torch.int16).as_strided(x.shape, torch.empty_like(x, device="meta").stride())
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
