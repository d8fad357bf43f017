"""Training passes as CUDA graphs: the host queues a network's hundreds of kernels in one call, not one by one."""

import contextlib
import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

MOST = 4  # kinds of passes that are recorded of a network; further ones run as they are
WARM_UPS = 3  # passes before a recording, in which cuDNN tries its kernels


@contextlib.contextmanager
def recorded(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, record each network's training passes when they first come, and replay them from then on.

    The networks' kernels, their order and their random numbers are those of passes that are not recorded. A recorded
    backward pass adds to the parameters' gradients, which must be zeroed between steps, not freed, and goes backward
    once. What a pass leaves in memory for its backward pass is kept from pass to pass. Evaluation runs as it is, and so
    do a pass of an input that needs a gradient, and one before the pass that came first has gone backward.

    Args:
        networks: on a CUDA device; within the block they must not be copied.
    """
    networks = list(networks)
    for network in networks:
        network.forward = _Passes(network)
    try:
        yield
    finally:
        for network in networks:
            del network.forward


def is_recorded(network: nn.Module) -> bool:
    """Tell whether a network is in a block of recorded()."""
    return isinstance(network.__dict__.get("forward"), _Passes)


class _Passes:
    """In the place of a network's forward(): (N, channels, *S) to logits (N, C, *S)."""

    def __init__(self, network: nn.Module):
        self.network, self.as_it_is = network, network.forward
        self.parameters, self.buffers = list(network.parameters()), list(network.buffers())
        self.layers = [module for module in network.modules() if isinstance(module, _BatchNorm | _DropoutNd)]
        self.kinds: dict[Hashable, _Pass] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.token = torch.zeros((), requires_grad=True)  # has autograd ask for the backward pass
        self.latest: weakref.ref[_Replayed] | None = None  # a pass that may yet go backward; needs what it left

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """The stream that all recordings are made on, so that they share memory."""
        return torch.cuda.Stream(self.parameters[0].device)

    def __call__(self, image: Tensor) -> Tensor:
        if not self.network.training or image.requires_grad or (self.latest is not None and self.latest() is not None):
            return self.as_it_is(image)
        learning = [p for p in self.parameters if p.requires_grad] if torch.is_grad_enabled() else []
        for parameter in learning:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        kind = self._kind(image, learning)
        if kind not in self.kinds and len(self.kinds) == MOST:
            return self.as_it_is(image)
        if kind not in self.kinds:
            self.kinds[kind] = _Pass(self, image, learning)
            if len(self.kinds) == MOST:
                LOGGER.info("NOTE: %d kinds of passes of a network are recorded; further ones are slower.", MOST)
        if not learning:
            return self.kinds[kind].forward(image)
        replayed = _Replayed(self, self.kinds[kind])
        self.latest = weakref.ref(replayed)
        return _Replay.apply(image, self.token, replayed)

    def _kind(self, image: Tensor, learning: Sequence[nn.Parameter]) -> Hashable:
        """Return all that a recording fixes: shapes, settings, what learns, and where in memory everything lies."""
        held = [*self.parameters, *self.buffers, *(parameter.grad for parameter in learning)]
        settings = [[getattr(layer, name, None) for layer in self.layers] for name in ("training", "momentum", "p")]
        settings.append([parameter.requires_grad for parameter in self.parameters])
        cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        return tuple(image.shape), image.dtype, cast, str(settings), tuple(tensor.data_ptr() for tensor in held)


class _Pass:
    """One kind of a network's passes, and its backward pass where parameters learn."""

    def __init__(self, of: _Passes, image: Tensor, learning: Sequence[nn.Parameter]):
        self.image = image.clone()
        with torch.cuda.device(image.device):
            self._try(of, learning)
            try:
                self._record(of, learning)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UserError(f"CUDA records no graph ({reason}): give --no_cuda_graphs.") from error

    def _run(self, of: _Passes) -> Tensor:
        """Do the pass; its casts of weights are part of it, since the weights move from step to step."""
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
            return of.as_it_is(self.image)

    def _try(self, of: _Passes, learning: Sequence[nn.Parameter]) -> None:
        """Do the pass a few times, as if nothing had been done."""
        buffers, random = [buffer.clone() for buffer in of.buffers], torch.cuda.get_rng_state(self.image.device)
        now = torch.cuda.current_stream()
        of.stream.wait_stream(now)
        with torch.cuda.stream(of.stream):
            for _ in range(WARM_UPS):
                logits = self._run(of)
                if learning:
                    torch.autograd.grad(logits, learning, torch.zeros_like(logits), allow_unused=True)
        now.wait_stream(of.stream)
        with torch.no_grad():
            for buffer, value in zip(of.buffers, buffers, strict=True):
                buffer.copy_(value)
        torch.cuda.set_rng_state(random, self.image.device)

    def _record(self, of: _Passes, learning: Sequence[nn.Parameter]) -> None:
        # Other threads pin batches and wait for pseudo-labels meanwhile, which only this mode allows.
        kept: dict[str, Any] = {"pool": of.pool, "stream": of.stream, "capture_error_mode": "thread_local"}
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward_graph, **kept):
            logits = self._run(of)
        self.logits, self.gradient = logits.detach(), torch.zeros_like(logits)
        if learning:
            with torch.cuda.graph(self.backward_graph, **kept):
                found = torch.autograd.grad(logits, learning, self.gradient, allow_unused=True)
                pairs = [(p.grad, g) for p, g in zip(learning, found, strict=True) if g is not None]
                torch._foreach_add_(*(list(tensors) for tensors in zip(*pairs, strict=True)))

    def forward(self, image: Tensor) -> Tensor:
        self.image.copy_(image)
        self.forward_graph.replay()
        return self.logits.clone()

    def backward(self, gradient: Tensor) -> None:
        self.gradient.copy_(gradient)
        self.backward_graph.replay()


class _Replayed:
    """One pass that was replayed; lives as long as it may go backward."""

    def __init__(self, passes: _Passes, one: _Pass):
        self.passes, self.one, self.is_done = passes, one, False

    def backward(self, gradient: Tensor) -> None:
        if self.is_done:
            raise RuntimeError("a recorded pass goes backward once: add up its losses first, or use no CUDA graphs")
        self.is_done, self.passes.latest = True, None
        self.one.backward(gradient)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, token: Tensor, replayed: _Replayed) -> Tensor:
        """Map the image (N, channels, *S) to logits (N, C, *S)."""
        ctx.replayed = replayed
        return replayed.one.forward(image)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        """Add the logits' gradient (N, C, *S) to the parameters'."""
        ctx.replayed.backward(gradient)
        return None, None, None
