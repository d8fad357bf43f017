"""Training passes as CUDA graphs: the host queues a network's hundreds of kernels in one call, not one by one."""

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from sdcl.runs.errors import UserError

MOST = 4  # kinds of passes that are recorded of a network; further ones run as they are
WARM_UPS = 3  # passes before a recording, in which cuDNN tries its kernels


@contextlib.contextmanager
def recorded(networks: Iterable[nn.Module], compiled: bool = False) -> Iterator[None]:
    """Within the block, record each network's training passes when they first come, and replay them from then on.

    The kernels, their order and their random numbers are those of passes that are not recorded, so the results are too.
    A recorded backward pass adds to the parameters' gradients, which must be zeroed between steps, not freed. What a
    pass leaves in memory for its backward pass is kept from pass to pass. Evaluation runs as it is.

    Args:
        networks: on a CUDA device; within the block they must not be copied.
        compiled: record the passes as torch.compile fuses them, which takes a minute a network.
    """
    networks = list(networks)
    for network in networks:
        network.forward = _Passes(network, compiled)
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

    def __init__(self, network: nn.Module, compiled: bool):
        self.network, self.as_it_is = network, network.forward
        self.to_record = torch.compile(network.forward) if compiled else network.forward
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.buffers = list(network.buffers())
        self.layers = [module for module in network.modules() if isinstance(module, _BatchNorm | _DropoutNd)]
        self.kinds: dict[Hashable, _Pass] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.token = torch.zeros((), requires_grad=True)  # has autograd ask for the backward pass
        self.waits = False  # a pass has yet to go backward, and needs what it left in memory

    def __call__(self, image: Tensor) -> Tensor:
        if not self.network.training or self.waits:
            return self.as_it_is(image)
        learns = torch.is_grad_enabled() and bool(self.parameters)
        for parameter in self.parameters if learns else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        kind = self._kind(image, learns)
        if kind not in self.kinds and len(self.kinds) == MOST:
            return self.as_it_is(image)
        if kind not in self.kinds:
            try:
                self.kinds[kind] = _Pass(self, image, learns)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                raise UserError(f"CUDA records no graph ({reason}): give --no_cuda_graphs.") from error
        one = self.kinds[kind]
        if not learns:
            return one.forward(image)
        self.waits = True
        return _Replay.apply(image, self.token, self, one)

    def _kind(self, image: Tensor, learns: bool) -> Hashable:
        """Return all that a recording fixes: shapes, the layers' settings, and where in memory everything lies."""
        held = [*self.parameters, *self.buffers, *((p.grad for p in self.parameters) if learns else ())]
        settings = [[getattr(layer, name, None) for layer in self.layers] for name in ("training", "momentum", "p")]
        cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        return tuple(image.shape), image.dtype, learns, cast, str(settings), tuple(tensor.data_ptr() for tensor in held)


class _Pass:
    """One kind of a network's passes, and its backward pass where it learns."""

    def __init__(self, of: _Passes, image: Tensor, learns: bool):
        self.image = image.clone()
        run = self._in_its_precision(of.to_record)
        buffers, random = [buffer.clone() for buffer in of.buffers], torch.cuda.get_rng_state(image.device)
        beside, now = torch.cuda.Stream(), torch.cuda.current_stream()
        beside.wait_stream(now)
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                logits = run()
                if learns:
                    torch.autograd.grad(logits, of.parameters, torch.zeros_like(logits), allow_unused=True)
        now.wait_stream(beside)
        del logits
        with torch.no_grad():  # as if nothing had been tried
            for buffer, value in zip(of.buffers, buffers, strict=True):
                buffer.copy_(value)
        torch.cuda.set_rng_state(random, image.device)
        # Other threads pin batches and wait for pseudo-labels meanwhile, which only this mode allows.
        kept: dict[str, Any] = {"pool": of.pool, "capture_error_mode": "thread_local"}
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward_graph, **kept):
            logits = run()
        self.logits, self.gradient = logits.detach(), torch.zeros_like(logits)
        if learns:
            with torch.cuda.graph(self.backward_graph, **kept):
                found = torch.autograd.grad(logits, of.parameters, self.gradient, allow_unused=True)
                pairs = [(p.grad, g) for p, g in zip(of.parameters, found, strict=True) if g is not None]
                torch._foreach_add_(*(list(tensors) for tensors in zip(*pairs, strict=True)))

    def _in_its_precision(self, as_it_is: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        """Return the pass; its casts of weights are part of it, since the weights move from step to step."""
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")

        def run() -> Tensor:
            with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
                return as_it_is(self.image)

        return run

    def forward(self, image: Tensor) -> Tensor:
        self.image.copy_(image)
        self.forward_graph.replay()
        return self.logits.clone()

    def backward(self, gradient: Tensor) -> None:
        self.gradient.copy_(gradient)
        self.backward_graph.replay()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, token: Tensor, passes: _Passes, one: _Pass) -> Tensor:
        """Map the image (N, channels, *S) to logits (N, C, *S)."""
        ctx.passes, ctx.one = passes, one
        return one.forward(image)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        """Add the logits' gradient (N, C, *S) to the parameters'."""
        ctx.one.backward(gradient)
        ctx.passes.waits = False
        return None, None, None, None
