"""Muon, an optimiser of matrices: a convolution moves in all directions alike, not in the few steepest."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
QUINTIC = (3.4445, -4.775, 2.0315)  # a, b, c: singular values s become a s + b s^3 + c s^5
ROUNDS = 5
SMALLEST = 1e-18  # norm of a matrix, whose square float32 still holds; below it, steps fade to 0


class Muon(torch.optim.Optimizer):
    """Muon for the weights of convolutions, Adam for biases and norms; both move by about the learning rate a step.

    A weight is a matrix with a row for each entry of its first axis. With its gradient G, M = 0.95 M + G, and it loses
    lr * sqrt(max(rows, columns)) * orthogonal(G + 0.95 M), whose root mean square is about lr, as of Adam's first step.

    Args:
        parameters: of a network.
        lr: the learning rate.
        weight_decay: decoupled, of every weight.

    Attributes:
        found_inf: 1 once neither weights nor momenta must move any more, else 0, as a fused Adam's.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024,
    kellerjordan.github.io/posts/muon (Nesterov momentum, the quintic's numbers).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0):
        given = list(parameters)
        groups: dict[torch.Size, list[nn.Parameter]] = {torch.Size(): []}
        for parameter in given:
            groups.setdefault(parameter.shape if parameter.ndim > 1 else torch.Size(), []).append(parameter)
        rest, *matrices = groups.values()
        # "fused" lets load_state_dict() put Adam's counts of steps where a fused Adam needs them: on the device.
        kept = [{"params": rest, "fused": True}, *({"params": same, "kept": ("momentum",)} for same in matrices)]
        super().__init__(kept, {"lr": lr, "weight_decay": weight_decay})
        self.found_inf = torch.zeros((), device=given[0].device)
        self._adam = torch.optim.AdamW([{"params": rest}], lr=lr, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """Move along the gradients."""
        self._adam.state, self._adam.found_inf = self.state, self.found_inf
        halted, lr, decay = self.found_inf > 0, self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        self._adam.param_groups[0].update(lr=lr, weight_decay=decay)
        self._adam.step()
        groups = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups[1:]]
        groups = [same for same in groups if same]
        momentum = 1 - (1 - MOMENTUM) * (1 - self.found_inf)
        directions = [self._directions(same, halted, momentum) for same in groups]
        for same, steps in zip(groups, orthogonal(directions), strict=True):
            steps = steps.mul_(lr * math.sqrt(max(steps.shape[1:]))).masked_fill_(halted, 0)
            if decay:
                torch._foreach_mul_(same, 1 - lr * decay * (1 - self.found_inf))
            torch._foreach_sub_(same, [step.view_as(weight) for step, weight in zip(steps, same, strict=True)])

    def _directions(self, weights: list[nn.Parameter], halted: Tensor, momentum: Tensor) -> Tensor:
        """Return G + 0.95 M of weights of one shape, as matrices (B, rows, columns)."""
        for weight in weights:
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight, requires_grad=False)
        gradients = [weight.grad.masked_fill(halted, 0) for weight in weights]
        momenta = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_mul_(momenta, momentum)
        torch._foreach_add_(momenta, gradients)
        torch._foreach_add_(gradients, momenta, alpha=MOMENTUM)
        return torch.stack([gradient.flatten(1) for gradient in gradients])


def orthogonal(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Bring all singular values near 1: between 0.68 and 1.21 where they are above 0.0016 of the matrix's norm.

    The polynomial of the source is applied five times, to the product of a matrix with its own transpose, which is
    the smaller one, so that those of one size go together: P = a I + b A + c A^2 for A = X X^T, then A = P A P; the
    result is the product of all P with X.

    Args:
        stacks: each (B, rows, columns); of zeros the result is zeros.

    Returns:
        The same shapes, the same singular vectors.

    Source: see Muon.
    """
    a, b, c = QUINTIC
    wide = [stack if stack.shape[1] <= stack.shape[2] else stack.mT for stack in stacks]
    wide = [x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=SMALLEST) for x in wide]
    found: dict[int, Tensor] = {}
    for side in {x.shape[1] for x in wide}:
        of_side = [i for i, x in enumerate(wide) if x.shape[1] == side]
        gram = torch.cat([wide[i] @ wide[i].mT for i in of_side])
        one = torch.eye(side, dtype=gram.dtype, device=gram.device)
        whole = one.expand_as(gram)
        for _ in range(ROUNDS):
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + a * one
            whole, gram = polynomial @ whole, polynomial @ gram @ polynomial
        for i, factor in zip(of_side, whole.split([len(wide[i]) for i in of_side]), strict=True):
            found[i] = factor @ wide[i]
    return [found[i] if stack.shape[1] <= stack.shape[2] else found[i].mT for i, stack in enumerate(stacks)]
