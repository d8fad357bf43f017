"""The two stages of the method as two steps and one loop, the same for 2D and 3D."""

import copy
import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdcl import checkpoints
from sdcl.errors import UserError
from sdcl.evaluation import PREDICTORS, STUDENTS
from sdcl.losses import DiceOver, discrepancy, mixed_losses
from sdcl.mixing import box_size, copy_paste_mask, mix
from sdcl.pseudo_labels import Rule, pseudo_label
from sdcl.report import Validation
from sdcl.runs import LOGGER, StageRecord
from sdcl.teacher import update_teacher

Stage = Literal["pre_train", "self_train"]
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


class Streams(Protocol):
    """Where batches come from: a function of the iteration's number alone, so that a run can go on anywhere."""

    iterations_per_epoch: int

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of iterations start to stop - 1, on the CPU."""
        ...


Validate = Callable[[list[nn.Module]], Validation]


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
        """Take over a checkpoint's networks and optimisers, those that it holds."""
        try:
            for role, values in state["networks"].items():
                self.networks[role].load_state_dict(values)
            for role, values in state["optimisers"].items():
                self.optimisers[role].load_state_dict(values)
        except (KeyError, RuntimeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} does not fit these networks ({str(error).splitlines()[0]}): remove its folder to train anew."
            ) from error


def make_learners(student_a: nn.Module, student_b: nn.Module, base_lr: float) -> Learners:
    """Give each student its own Adam (method.md, "Stage 1")."""
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

    Source: method.md, "Stage 1".
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

    Source: method.md, "Stage 2".
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


def pretrain(
    learners: Learners,
    streams: Streams,
    folder: Path,
    method: Method,
    *,
    validate: Validate | None,
    validate_at: Collection[int],
    config: dict[str, Any],
) -> None:
    """Run stage 1 to its end, from where the run's folder left it.

    Args:
        learners: the students; changed in place.
        streams: batches of two labelled streams.
        folder: the run's folder; this stage writes into its pre_train/.
        method: the script's header.
        validate: scores the students; None: nothing is validated or selected.
        validate_at: iterations (from 1) after which to validate; the last one always is.
        config: kept in each checkpoint.

    Raises:
        UserError: the folder's checkpoint does not fit, a loss is not finite, or the disk is full.
    """
    loop = _Loop("pre_train", pretrain_step, learners, streams, folder, method, validate, validate_at, config)
    loop.run(method.pre_iterations)


def self_train(
    learners: Learners,
    streams: Streams,
    folder: Path,
    method: Method,
    *,
    validate: Validate | None,
    validate_at: Collection[int],
    config: dict[str, Any],
    start_from: Literal["best", "last"],
    pretrained: Path | None = None,
) -> None:
    """Run stage 2 to its end: from stage 1's checkpoints, or from where the run's folder left it.

    Args:
        learners: the students; a teacher is added; changed in place.
        streams: batches of two labelled and two unlabelled streams.
        folder: the run's folder; this stage writes into its self_train/.
        method: the script's header.
        validate: scores the students; None: nothing is validated or selected.
        validate_at: iterations (from 1) after which to validate; the last one always is.
        config: kept in each checkpoint.
        start_from: stage 1's checkpoints to start from: each student's best, or the last.
        pretrained: another run's folder, to start from its stage 1.

    Raises:
        UserError: stage 1 left no checkpoint, or as in pretrain().
    """
    if not (folder / "self_train" / "last.pth").exists():
        begin = (pretrained or folder) / "pre_train"
        names = {"best": [f"best_{role}.pth" for role in STUDENTS], "last": ["last.pth"]}[start_from]
        for name in names:
            learners.load(checkpoints.load(begin / name), begin / name)
    learners.best, learners.iteration = {}, 0
    add_teacher(learners)
    loop = _Loop("self_train", self_train_step, learners, streams, folder, method, validate, validate_at, config)
    loop.run(method.self_iterations)


def validation_iterations(first: int, every: int, last: int) -> range:
    """Return the iterations after which to validate: first, then every so many; none for every = 0."""
    return range(first or every, last + 1, every) if every else range(0)


def iteration_seed(seed: int, stage: Stage, iteration: int) -> int:
    """Derive one iteration's seed, so that its randomness depends on nothing that came before it."""
    entropy = [seed, ("pre_train", "self_train").index(stage), iteration]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to the device without waiting for it."""
    if device.type == "cuda":
        return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}
    return batch


class _Loop:
    """One stage's loop: resume, step, record, validate, save."""

    def __init__(
        self,
        stage: Stage,
        step: Callable[[Learners, Batch, Tensor, Method], Losses],
        learners: Learners,
        streams: Streams,
        run_folder: Path,
        method: Method,
        validate: Validate | None,
        validate_at: Collection[int],
        config: dict[str, Any],
    ):
        self.stage, self.step, self.learners, self.streams, self.method = stage, step, learners, streams, method
        self.folder, self.config = run_folder / stage, config
        self.validate, self.validate_at = validate, validate_at
        self.device = next(learners.networks["student_a"].parameters()).device
        self.unread: list[tuple[int, Losses]] = []  # losses that are still on the device
        self.seconds: list[float] = []

    def run(self, iterations: int) -> None:
        """Train until so many iterations are done."""
        self._resume()
        start = self.learners.iteration
        if start >= iterations:
            LOGGER.info("%s: all %d iterations are done already", self.stage, start)
            return
        record = StageRecord(self.folder, self._columns(), start + 1)
        LOGGER.info("%s: iterations %d to %d in %s", self.stage, start + 1, iterations, self.folder)
        bar = tqdm(total=iterations, initial=start, desc=self.stage, unit="it", dynamic_ncols=True)
        try:
            for batch in self.streams.batches(start, iterations):
                self._iterate(batch, iterations, record, bar)
        finally:
            bar.close()
            record.close()

    def _iterate(self, batch: Batch, iterations: int, record: StageRecord, bar: tqdm) -> None:
        begin = time.perf_counter()
        number = self.learners.iteration + 1
        torch.manual_seed(iteration_seed(self.method.seed, self.stage, number))
        for network in self.learners.networks.values():
            network.train()  # the teacher too: its dropout is on and its BatchNorm uses the batch
        shape = batch["x_a"].shape[2:]
        mask = copy_paste_mask(shape, box_size(shape, self.method.mask_fraction)).to(self.device, non_blocking=True)
        losses = self.step(self.learners, to_device(batch, self.device), mask, self.method)
        self.unread.append((number, losses))
        self.learners.iteration = number
        self.seconds.append(time.perf_counter() - begin)
        is_last = number == iterations
        is_validated = self.validate is not None and (is_last or number in self.validate_at)
        is_saved = is_last or is_validated or number % self.method.save_every == 0
        if is_saved or number % self.method.log_every == 0:
            rows = self._read_losses()
            scores = self._validate(record) if is_validated else {}
            rows[-1] |= {f"val_dice/{name}": value for name, value in scores.items()}
            record.add(rows)
            self._show(bar, rows[-1], scores)
        if is_saved:
            checkpoints.save(self._payload(), self.folder / "last.pth")
        if is_last:
            self._log_cost()
        bar.update()

    def _columns(self) -> list[str]:
        parts = ["loss", "dice", "ce"] + (["mse", "kl"] if self.stage == "self_train" else [])
        columns = [f"{role}/{part}" for role in STUDENTS for part in parts]
        columns += ["discrepancy"] if self.stage == "self_train" else []
        return ["iteration", *columns, *(f"val_dice/{name}" for name in PREDICTORS)]

    def _read_losses(self) -> list[dict[str, float]]:
        """Fetch the losses that wait on the device, in one copy, and stop the run where one is not finite."""
        values = torch.stack([torch.stack([v.float() for v in losses.values()]) for _, losses in self.unread]).tolist()
        rows = []
        for (number, losses), numbers in zip(self.unread, values, strict=True):
            row = {"iteration": number} | dict(zip(losses, numbers, strict=True))
            wrong = [name for name, value in row.items() if not math.isfinite(value)]
            if wrong:
                raise UserError(
                    f"{', '.join(wrong)} became nan or infinite at iteration {number} of {self.stage}: "
                    f"lower --base_lr or check the data; {self.folder} keeps the last finite checkpoint."
                )
            rows.append(row)
        self.unread.clear()
        return rows

    def _validate(self, record: StageRecord) -> dict[str, float]:
        for network in self.learners.students:
            network.eval()
        validation = self.validate(self.learners.students)
        number = self.learners.iteration
        for name, dice in validation.dice.items():
            if dice > self.learners.best.get(name, {"dice": -1.0})["dice"]:
                self.learners.best[name] = {"dice": dice, "iteration": number}
                members = [STUDENTS[i] for i in PREDICTORS[name]]
                checkpoints.save(self._payload(members), self.folder / f"best_{name}.pth")
        if validation.panel is not None:
            record.add_image("validation", validation.panel, number)
        best = self.learners.best
        scores = [
            f"{n} {dice:.4f} (best {best[n]['dice']:.4f} at {best[n]['iteration']})"
            for n, dice in validation.dice.items()
        ]
        LOGGER.info("%s %d: validation Dice %s", self.stage, number, ", ".join(scores))
        return validation.dice

    def _show(self, bar: tqdm, row: dict[str, float], scores: dict[str, float]) -> None:
        self._shown = getattr(self, "_shown", {}) | {f"val_{name}": f"{value:.3f}" for name, value in scores.items()}
        losses = {f"loss_{role[-1]}": f"{row[f'{role}/loss']:.3f}" for role in STUDENTS}
        bar.set_postfix(losses | self._shown)

    def _payload(self, roles: Collection[str] | None = None) -> dict[str, Any]:
        return self.learners.state(roles) | {"stage": self.stage, "config": self.config}

    def _resume(self) -> None:
        path = self.folder / "last.pth"
        if path.exists():
            state = checkpoints.load(path)
            self.learners.load(state, path)
            self.learners.best, self.learners.iteration = state["best"], state["iteration"]

    def _log_cost(self) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
        else:
            peak = _peak_memory_gb()
        LOGGER.info(
            "%s: %.3f s an iteration (median of %d, validation apart), peak memory %.2f GiB",
            self.stage, float(np.median(self.seconds)), len(self.seconds), peak,
        )  # fmt: skip


def _peak_memory_gb() -> float:
    """Return this process's peak resident memory in GiB; nan where the system does not tell (Windows)."""
    try:
        import resource
        import sys
    except ImportError:
        return math.nan
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
