"""One training step of each stage, the same for 2D and 3D, and what the steps change."""

import copy
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from sdcl.errors import UserError
from sdcl.evaluation import STUDENTS
from sdcl.losses import DiceOver, discrepancy, mixed_losses
from sdcl.mixing import mix
from sdcl.pseudo_labels import Rule, pseudo_label
from sdcl.teacher import update_teacher

Batch = dict[str, Tensor]
Losses = dict[str, Tensor]


class Method(Protocol):
    """What the loops read of a script's header; every number of the method is one of its fields."""

    seed: int
    precision: Literal["fp32", "bf16"]
    pre_iterations: int
    self_iterations: int
    mask_fraction: float
    pre_dice: Literal["regions", "whole"]
    dice: DiceOver
    u_weight: float
    mse_weight: float
    kl_weight: float
    pseudo_label_rule: Rule
    connectivity: int
    ema_decay: float
    ema_buffers: bool
    log_every: int
    save_every: int


@dataclass
class Learners:
    """Everything with state: networks and optimisers by role, the best scores so far, iterations done.

    Attributes:
        networks: "student_a", "student_b", and in self-training "teacher".
        optimisers: one for each student.
        best: predictor to {"dice", "iteration"}.
        iteration: iterations of the stage that are done.
    """

    networks: dict[str, nn.Module]
    optimisers: dict[str, torch.optim.Optimizer]
    best: dict[str, dict[str, float]] = field(default_factory=dict)
    iteration: int = 0

    @property
    def students(self) -> list[nn.Module]:
        """Both students, a first."""
        return [self.networks[role] for role in STUDENTS]

    def state(self, roles: Collection[str] | None = None) -> dict[str, Any]:
        """Return what a checkpoint keeps, of all roles or of some."""
        return {
            "networks": {r: n.state_dict() for r, n in self.networks.items() if roles is None or r in roles},
            "optimisers": {r: o.state_dict() for r, o in self.optimisers.items() if roles is None or r in roles},
            "best": self.best,
            "iteration": self.iteration,
        }

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Take over a checkpoint's networks and optimisers, those that it holds; learning rates stay this run's."""
        try:
            for role, values in state["networks"].items():
                self.networks[role].load_state_dict(values)
            for role, values in state["optimisers"].items():
                rate = self.optimisers[role].param_groups[0]["lr"]
                self.optimisers[role].load_state_dict(values)
                for group in self.optimisers[role].param_groups:
                    group["lr"] = rate
        except (KeyError, RuntimeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} does not fit these networks ({str(error).splitlines()[0]}): restore a copy of it, "
                "or choose another --exp to train anew."
            ) from error


def make_learners(student_a: nn.Module, student_b: nn.Module, base_lr: float) -> Learners:
    """Give each student its own Adam (docs/method.md, "Stage 1")."""
    networks = dict(zip(STUDENTS, (student_a, student_b), strict=True))
    optimisers = {role: torch.optim.Adam(network.parameters(), lr=base_lr) for role, network in networks.items()}
    return Learners(networks, optimisers)


def add_teacher(learners: Learners) -> None:
    """Make the teacher: a copy of student a that no gradient reaches."""
    learners.networks["teacher"] = copy.deepcopy(learners.networks["student_a"]).requires_grad_(False)


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()


def pretrain_step(learners: Learners, batch: Batch, mask: Tensor, method: Method) -> Losses:
    """Train both students once on a copy-paste mix of two labelled batches.

    Args:
        learners: changed in place.
        batch: "x_a", "x_b" (N, 1, *S) float32; "y_a", "y_b" (N, *S) integers; on the networks' device.
        mask: (*S), True keeps batch a.
        method: reads pre_dice, dice, precision.

    Returns:
        Named scalars on the device: "<student>/loss", "/dice", "/ce".

    Source: docs/method.md, "Stage 1".
    """
    image = mix(batch["x_a"], batch["x_b"], mask)
    label = mix(batch["y_a"], batch["y_b"], mask)
    region = mask if method.pre_dice == "regions" else None
    named: Losses = {}
    for role in STUDENTS:
        with _autocast(image.device, method.precision):
            logits = learners.networks[role](image)
        losses = mixed_losses(logits, label, label, region, image_weight=1.0, patch_weight=1.0, dice=method.dice)
        loss = (losses["dice"] + losses["ce"]) / 2
        _descend(learners.optimisers[role], loss)
        named |= {f"{role}/{name}": losses[name].detach() for name in ("dice", "ce")} | {f"{role}/loss": loss.detach()}
    return named


def self_train_step(learners: Learners, batch: Batch, mask: Tensor, method: Method) -> Losses:
    """Train both students once on mixes of labelled and unlabelled batches, then move the teacher.

    Args:
        learners: changed in place; has a teacher.
        batch: as in pretrain_step, and the unlabelled "u_a", "u_b" (N, 1, *S).
        mask: (*S), True keeps the image: u_a in the first mix, x_a in the second.
        method: reads the loss weights, the pseudo-labels' rule, the EMA's settings, dice and precision.

    Returns:
        Named scalars on the device: "<student>/loss", "/dice", "/ce", "/mse", "/kl" (unweighted sums over both
        mixes) and "discrepancy", the number of voxels where the students disagree, in both mixes.

    Source: docs/method.md, "Stage 2".
    """
    teacher = learners.networks["teacher"]
    with torch.no_grad(), _autocast(mask.device, method.precision):
        pseudo_a, pseudo_b = (
            pseudo_label(teacher(batch[name]), method.pseudo_label_rule, method.connectivity) for name in ("u_a", "u_b")
        )
    # Each mix: its input, the label where the mask is True, the label where it is False, and the weights of both.
    mixes = [
        (mix(batch["u_a"], batch["x_b"], mask), pseudo_a, batch["y_b"], method.u_weight, 1.0),
        (mix(batch["x_a"], batch["u_b"], mask), batch["y_a"], pseudo_b, 1.0, method.u_weight),
    ]
    with _autocast(mask.device, method.precision):
        # Two separate forward passes a student: BatchNorm's statistics are each mix's own.
        logits = {role: [learners.networks[role](image) for image, *_ in mixes] for role in STUDENTS}
    disagree = [discrepancy(*pair) for pair in zip(*logits.values(), strict=True)]
    named: Losses = {}
    for role in STUDENTS:
        parts = [
            mixed_losses(
                z, image_label, patch_label, mask,
                image_weight=image_weight, patch_weight=patch_weight, dice=method.dice, discrepancy=where,
            )
            for z, (_, image_label, patch_label, image_weight, patch_weight), where in zip(
                logits[role], mixes, disagree, strict=True
            )
        ]  # fmt: skip
        losses = {name: parts[0][name] + parts[1][name] for name in parts[0]}
        loss = (losses["dice"] + losses["ce"]) / 2 + method.mse_weight * losses["mse"] + method.kl_weight * losses["kl"]
        _descend(learners.optimisers[role], loss)
        named |= {f"{role}/{name}": value.detach() for name, value in losses.items()} | {f"{role}/loss": loss.detach()}
    update_teacher(teacher, learners.networks["student_a"], method.ema_decay, method.ema_buffers)
    return named | {"discrepancy": sum(where.sum() for where in disagree)}
