"""What a training step changes and is made of, whatever the method; and stage 1's step, which all methods share."""

import copy
import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from sdcl import checkpoints, ranks
from sdcl.graphs import is_recorded
from sdcl.losses import DiceOver, mixed_losses
from sdcl.mixing import mix
from sdcl.muon import Muon
from sdcl.pseudo_labels import PendingLabels, Rule
from sdcl.runs.errors import UserError
from sdcl.schedule import Schedule
from sdcl.scoring.evaluation import STUDENTS
from sdcl.teacher import growing_decay, update_teacher

TEACHER = "teacher"  # the EMA teacher's role
Batch = dict[str, Tensor]
Losses = dict[str, Tensor]


class Settings(Protocol):
    """What the loops and methods read of a script's header; every number of a method is one of its fields."""

    method: str
    seed: int
    precision: Literal["fp32", "tf32", "bf16"]
    compile: bool
    cuda_graphs: bool
    lr_schedule: Schedule
    warmup: int
    pre_iterations: int
    self_iterations: int
    mask_fraction: float
    pre_dice: Literal["regions", "whole"]
    dice: DiceOver
    u_weight: float
    correct: Literal["discrepancy", "everywhere", "none"]
    mse_weight: float
    kl_weight: float
    pseudo_label_rule: Rule
    largest_component: Literal["yes", "no"]
    connectivity: int
    teacher_dropout: Literal["yes", "no"]
    ema_decay: float
    ema_buffers: bool
    ema_warmup: bool
    average_decay: float
    consistency_weight: float
    rampup: int | None
    noise: float
    passes: int
    paste: Literal["yes", "no"]
    log_every: int
    save_every: int
    save_minutes: float


@dataclass
class Learners:
    """Everything with state: networks and optimisers by role, the best scores so far, iterations done.

    Attributes:
        networks: those that a stage's method trains, such as "student_a" and "student_b", and maybe the "teacher".
        optimisers: one for each student.
        best: predictor to {"dice", "iteration"}.
        iteration: iterations of the stage that are done.
        base_lr: the students' learning rate, of which a schedule takes its share.
        halted: 1 on the device from the first loss or gradient on that is not finite, then nothing moves any more;
            0 before. So nothing needs to wait for the device at each step.
        aside: parameters and their gradients of passes before the last one; see set_aside().
    """

    networks: dict[str, nn.Module]
    optimisers: dict[str, torch.optim.Optimizer]
    best: dict[str, dict[str, float]] = field(default_factory=dict)
    iteration: int = 0
    base_lr: float = 1e-3
    halted: Tensor = field(default_factory=lambda: torch.zeros(()))
    aside: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    @property
    def students(self) -> list[nn.Module]:
        """The networks that are trained, student a first."""
        return [self.networks[role] for role in self.optimisers]

    def set_rate(self, share: float) -> None:
        """Give all students this share of the learning rate."""
        for optimiser in self.optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = self.base_lr * share

    def keep(self, roles: Collection[str]) -> None:
        """Forget the students that a method does not train, with their optimisers."""
        for held in (self.networks, self.optimisers):
            for role in [role for role in held if role not in roles]:
                del held[role]

    def state(self, roles: Collection[str] | None = None) -> dict[str, Any]:
        """Return what a checkpoint keeps, of all roles or of some."""
        return {
            "networks": {r: n.state_dict() for r, n in self.networks.items() if roles is None or r in roles},
            "optimisers": {r: o.state_dict() for r, o in self.optimisers.items() if roles is None or r in roles},
            "best": self.best,
            "iteration": self.iteration,
        }

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Take over a checkpoint's networks and optimisers, those that it holds; the settings stay this run's.

        Raises:
            UserError: something does not fit; nothing has been copied.
        """
        networks, optimisers = state.get("networks"), state.get("optimisers")
        for held, ours in ((networks, self.networks), (optimisers, self.optimisers)):
            if not isinstance(held, dict) or not held or not set(held) <= set(ours):
                raise UserError(f"{path} is not a checkpoint of a run: choose one of this repository's.")
        for role, values in networks.items():
            checkpoints.check_state(values, self.networks[role], path)
        for role, values in optimisers.items():
            checkpoints.check_optimiser(values, self.optimisers[role], path)
        for role, values in networks.items():
            self.networks[role].load_state_dict(values)
        for role, values in optimisers.items():
            groups = self.optimisers[role].state_dict()["param_groups"]  # the learning rate and all else of this run
            self.optimisers[role].load_state_dict({"state": values["state"], "param_groups": groups})
            for parameter, moments in self.optimisers[role].state.items():
                for name, moment in moments.items():
                    if moment.shape == parameter.shape:  # in its memory layout too: a fused Adam walks both in step
                        moments[name] = torch.empty_like(parameter, requires_grad=False).copy_(moment)


def make_learners(
    student_a: nn.Module,
    student_b: nn.Module,
    base_lr: float,
    weight_decay: float = 0.0,
    optimiser: Literal["adam", "muon"] = "adam",
) -> Learners:
    """Give each student its own optimiser, by default Adam (docs/method.md, "Stage 1"), which the device can halt.

    Args:
        student_a: the first student.
        student_b: the second one.
        base_lr: the learning rate.
        weight_decay: decoupled (Loshchilov and Hutter, ICLR 2019): a step takes its share, times the rate, of a weight.
        optimiser: "adam", or "muon" (see sdcl.muon).
    """
    networks = dict(zip(STUDENTS, (student_a, student_b), strict=True))
    parameters = [p for network in networks.values() for p in network.parameters() if p.requires_grad]
    for parameter in (p for p in parameters if p.device.type == "cpu"):
        # Kept and zeroed, not made anew among a step's activations, where they would cut a CPU's memory into pieces.
        parameter.grad = torch.zeros_like(parameter)
    adam = functools.partial(torch.optim.AdamW, weight_decay=weight_decay) if weight_decay else torch.optim.Adam
    make = {
        "adam": functools.partial(adam, lr=base_lr, fused=True),
        "muon": functools.partial(Muon, lr=base_lr, weight_decay=weight_decay),
    }[optimiser]
    optimisers: dict[str, torch.optim.Optimizer] = {r: make(n.parameters()) for r, n in networks.items()}
    halted = torch.zeros((), device=next(student_a.parameters()).device)
    return Learners(networks, optimisers, base_lr=base_lr, halted=halted)


def add_teacher(learners: Learners) -> None:
    """Make the teacher: a copy of student a that no gradient reaches."""
    learners.networks[TEACHER] = copy.deepcopy(learners.networks["student_a"]).requires_grad_(False)


def add_averages(learners: Learners) -> None:
    """Make the averages of the students' weights, copies that no gradient reaches; see move_averages()."""
    for role in learners.optimisers:
        learners.networks[role + checkpoints.AVERAGE] = copy.deepcopy(learners.networks[role]).requires_grad_(False)


def move_averages(learners: Learners, decay: float) -> None:
    """Move each average, BatchNorm's statistics included, towards its student after a step, by growing_decay().

    A student that holds what is not finite spoils its average, whose run ends with the next reading of the losses.
    """
    for role in learners.optimisers:
        average, student = learners.networks[role + checkpoints.AVERAGE], learners.networks[role]
        update_teacher(average, student, growing_decay(learners.iteration, decay), buffers=True)


def averaged(predictors: Mapping[str, tuple[str, ...]], decay: float) -> dict[str, tuple[str, ...]]:
    """Return the roles by predictor, each student's average in its place where there is one: a decay above 0."""
    return {
        name: tuple(role + checkpoints.AVERAGE if decay and role in STUDENTS else role for role in roles)
        for name, roles in predictors.items()
    }


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Let networks compute in bfloat16 where the precision is "bf16"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def adds_in_place(student: nn.Module) -> bool:
    """Tell whether a student's passes add to the gradients that are there: on a CPU, and as recorded graphs."""
    return next(student.parameters()).device.type == "cpu" or is_recorded(student)


def clear_gradients(learners: Learners) -> None:
    """Clear the students' gradients before a step; see adds_in_place()."""
    for role, optimiser in learners.optimisers.items():
        optimiser.zero_grad(set_to_none=not adds_in_place(learners.networks[role]))
    learners.aside = {}
    for parameter in (p for student in learners.students for p in student.parameters() if not p.requires_grad):
        parameter.grad = None  # Adam leaves it alone; with a gradient of 0 its moments would still move it


def set_aside(learners: Learners) -> None:
    """Keep the gradients so far apart from the next backward pass's, which else adds to each in a launch of its own.

    On a CPU, where a launch costs nothing and memory would be cut into pieces, they stay where they are. The sums are
    the same bits: join_gradients() adds the earlier passes' to the last one's.
    """
    found = {
        p: p.grad
        for student in learners.students
        if not adds_in_place(student)
        for p in student.parameters()
        if p.grad is not None
    }
    for parameter in found:
        parameter.grad = None
    both = [p for p in found if p in learners.aside]
    if both:
        torch._foreach_add_([learners.aside[p] for p in both], [found[p] for p in both])
    learners.aside = found | learners.aside


def join_gradients(learners: Learners) -> None:
    """Make each parameter's gradient that of all passes since clear_gradients(); see set_aside()."""
    set_aside(learners)
    for parameter, gradient in learners.aside.items():
        parameter.grad = gradient
    learners.aside = {}


def descend(learners: Learners, named: Losses) -> Losses:
    """Move the students one step along their gradients, unless something is not finite.

    Args:
        learners: have their gradients; once one of them or a loss is not finite, nothing is moved any more.
        named: holds "<student>/loss".

    Returns:
        "<student>/grad_norm", the gradients' L2 norms.
    """
    norms: Losses = {}
    join_gradients(learners)
    ranks.add_gradients(p for student in learners.students for p in student.parameters())
    for role in learners.optimisers:
        gradients = [p.grad for p in learners.networks[role].parameters() if p.grad is not None]
        norms[f"{role}/grad_norm"] = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    numbers = torch.stack([*norms.values(), *(named[f"{role}/loss"] for role in learners.optimisers)])
    learners.halted = learners.halted.masked_fill(~torch.isfinite(numbers).all(), 1.0)
    for role in learners.optimisers:
        learners.optimisers[role].found_inf = learners.halted  # read on the device
        learners.optimisers[role].step()
    return norms


def pretrain_step(learners: Learners, batch: Batch, mask: Tensor, settings: Settings) -> Losses:
    """Train the students once on a copy-paste mix of two labelled batches.

    Args:
        learners: changed in place.
        batch: "x_a", "x_b" (N, channels, *S) float32; "y_a", "y_b" (N, *S) integers; on the networks' device.
        mask: (*S), True keeps batch a.
        settings: reads pre_dice, dice, precision.

    Returns:
        Named scalars on the device: "<student>/loss", "/dice", "/ce", "/grad_norm" (L2, of the step's gradient).

    Source: docs/method.md, "Stage 1".
    """
    image = mix(batch["x_a"], batch["x_b"], mask)
    label = mix(batch["y_a"], batch["y_b"], mask)
    region = mask if settings.pre_dice == "regions" else None
    clear_gradients(learners)
    named: Losses = {}
    for role in learners.optimisers:
        with autocast(image.device, settings.precision):
            logits = learners.networks[role](image)
        losses = mixed_losses(logits, label, label, region, image_weight=1.0, patch_weight=1.0, dice=settings.dice)
        loss = (losses["dice"] + losses["ce"]) / 2
        loss.backward()
        named |= {f"{role}/{name}": losses[name].detach() for name in ("dice", "ce")} | {f"{role}/loss": loss.detach()}
    return named | descend(learners, named)


Where = Callable[[dict[str, Tensor]], Tensor | None]


def mixed_step(learners: Learners, batch: Batch, mask: Tensor, settings: Settings, where: Where) -> Losses:
    """Train the students once on mixes of labelled and unlabelled batches, then move the teacher.

    Args:
        learners: changed in place; has a teacher.
        batch: as in pretrain_step, and the unlabelled "u_a", "u_b" (N, 1, *S).
        mask: (*S), True keeps the image: u_a in the first mix, x_a in the second.
        settings: reads the loss weights, the pseudo-labels' rule, the EMA's settings, dice and precision.
        where: maps the students' logits (N, C, *S) by role to the voxels (N, *S) where the two correction losses act;
            None: there are none.

    Returns:
        Named scalars on the device: "<student>/loss", "/dice", "/ce", and with corrections "/mse", "/kl" (unweighted
        sums over both mixes), "/grad_norm" and "discrepancy", the number of those voxels, in both mixes.

    Source: docs/method.md, "Stage 2".
    """
    teacher = learners.networks[TEACHER]
    connectivity = settings.connectivity if settings.largest_component == "yes" else None
    with torch.no_grad(), autocast(mask.device, settings.precision):
        pending = [
            PendingLabels(teacher(batch[name]), settings.pseudo_label_rule, connectivity) for name in ("u_a", "u_b")
        ]
    # Each mix: its input, the label where the mask is True, the label where it is False, and the weights of both.
    mixes = [
        (("u_a", "x_b"), lambda: (pending[0].result(), batch["y_b"]), (settings.u_weight, 1.0)),
        (("x_a", "u_b"), lambda: (batch["y_a"], pending[1].result()), (1.0, settings.u_weight)),
    ]
    clear_gradients(learners)
    of_students: Losses = {}
    # Two separate forward passes a student: BatchNorm's statistics are each mix's own. Going backward after each mix
    # adds up the same gradient as after both, and halves the memory of what the backward passes need.
    for (image, patch), labels, weights in mixes:
        with autocast(mask.device, settings.precision):
            mixed = mix(batch[image], batch[patch], mask)
            logits = {role: learners.networks[role](mixed) for role in learners.optimisers}
        # Asked for only now that the students have run, since pseudo-labels are cleaned meanwhile.
        targets = (where(logits), *labels())
        set_aside(learners)
        add_up(of_students, _learn(logits, targets, mask, weights, settings))
    named = {"discrepancy": of_students.pop("discrepancy")} if "discrepancy" in of_students else {}
    for name, values in of_students.items():
        named |= {f"{role}/{name}": value for role, value in zip(learners.optimisers, values.unbind(), strict=True)}
    named |= descend(learners, named)
    student = learners.networks["student_a"]
    decay = growing_decay(learners.iteration, settings.ema_decay) if settings.ema_warmup else settings.ema_decay
    update_teacher(teacher, student, decay, settings.ema_buffers, learners.halted)
    return named


def _learn(
    logits: dict[str, Tensor],
    targets: tuple[Tensor | None, Tensor, Tensor],
    mask: Tensor,
    weights: tuple[float, float],
    settings: Settings,
) -> Losses:
    """Add one mix's gradient to the students, and return its part of mixed_step()'s losses.

    Both students' are taken together: each loss is (students), and "discrepancy", where there is one, a scalar.

    Args:
        logits: of each student (N, C, *S); emptied.
        targets: where the corrections act (N, *S) or None, and the labels (N, *S) where the mask is True and False.
        mask: (*S).
        weights: of the two regions.
        settings: see mixed_step().
    """
    acting, image_label, patch_label = targets
    losses = mixed_losses(
        list(logits.values()), image_label, patch_label, mask,
        image_weight=weights[0], patch_weight=weights[1], dice=settings.dice, discrepancy=acting,
    )  # fmt: skip
    logits.clear()
    loss = (losses["dice"] + losses["ce"]) / 2
    if acting is None:
        losses = {name: losses[name] for name in ("dice", "ce")}
    else:
        loss = torch.add(loss, losses["mse"], alpha=settings.mse_weight)
        loss = torch.add(loss, losses["kl"], alpha=settings.kl_weight)
    loss.backward(torch.ones_like(loss))
    found = {name: value.detach() for name, value in losses.items()} | {"loss": loss.detach()}
    return found if acting is None else found | {"discrepancy": ranks.total(acting.sum())}


def supervised_step(learners: Learners, batch: Batch, settings: Settings) -> Losses:
    """Add the gradient of `sup` on the labelled images themselves to each student: x_a and x_b, half each.

    Args:
        learners: the gradients of the students' parameters are changed; clear_gradients() comes before.
        batch: as in pretrain_step().
        settings: reads dice and precision.

    Returns:
        "<student>/loss", "/dice" and "/ce", means over both batches.

    Source: docs/methods.md: sup(z, y) = (Dice + CE) / 2.
    """
    named: Losses = {}
    for image, label in ((batch["x_a"], batch["y_a"]), (batch["x_b"], batch["y_b"])):
        set_aside(learners)
        for role in learners.optimisers:
            with autocast(image.device, settings.precision):
                logits = learners.networks[role](image)
            losses = mixed_losses(logits, label, label, None, image_weight=0.5, patch_weight=0.5, dice=settings.dice)
            loss = (losses["dice"] + losses["ce"]) / 2
            loss.backward()
            found = {"loss": loss, "dice": losses["dice"], "ce": losses["ce"]}
            add_up(named, {f"{role}/{name}": value.detach() for name, value in found.items()})
    join_gradients(learners)
    return named


def add_up(named: Losses, more: Losses) -> None:
    """Add losses to those of the same names, in place."""
    for name, value in more.items():
        named[name] = named[name] + value if name in named else value
