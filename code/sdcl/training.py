"""The two stages of the method as one loop, the same for 2D and 3D."""

import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdcl import checkpoints, ranks
from sdcl.graphs import recorded
from sdcl.methods import get
from sdcl.mixing import box_size, copy_paste_mask
from sdcl.runs.data import Stage
from sdcl.runs.devices import compile_networks, records_passes
from sdcl.runs.distribution import agree, check_weights, first, is_first, part, wait
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER, StopRequest, duration
from sdcl.runs.records import NoRecord, StageRecord
from sdcl.runs.resume import resume
from sdcl.schedule import share
from sdcl.scoring.evaluation import PREDICTORS, Predictors, Validation
from sdcl.steps import (
    TEACHER,
    Batch,
    Learners,
    Losses,
    Settings,
    add_averages,
    add_teacher,
    averaged,
    make_learners,
    move_averages,
    pretrain_step,
)

MEASURED = 4  # iterations after which the end is foretold
WATCHED = 200  # iterations after which a run that waits for its batches says so
MUCH = 0.2  # share of the time
__all__ = ["make_learners", "pretrain", "pretrain_step", "self_train", "validation_iterations"]


class Streams(Protocol):
    """Where batches come from: a function of the iteration's number alone, so that a run can go on anywhere."""

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of iterations start to stop - 1, on the CPU."""
        ...

    def names(self, iteration: int) -> dict[str, list[str]]:
        """Return the names of the cases in an iteration's batch, from 0, by stream."""
        ...


Validate = Callable[[Predictors], Validation]


def pretrain(
    learners: Learners,
    streams: Streams,
    folder: Path,
    settings: Settings,
    *,
    validate: Validate | None,
    validate_at: Collection[int],
    validated_on: str,
    config: dict[str, Any],
) -> None:
    """Run stage 1 to its end, from where the run's folder left it.

    Args:
        learners: the students; changed in place.
        streams: batches of two labelled streams.
        folder: the run's folder; this stage writes into its pre_train/.
        settings: the script's header; its `method` names what stage 2 is.
        validate: scores a stage's predictors; None: nothing is validated or selected.
        validate_at: iterations (from 1) after which to validate; the last one always is.
        validated_on: the name of what validate scores on, "val" or "test"; logs and columns carry it.
        config: kept in each checkpoint.

    Raises:
        UserError: the folder's checkpoint does not fit, a loss is not finite, or the disk is full.
    """
    validations = _Validations(validate, validate_at, validated_on)
    _Loop("pre_train", learners, streams, settings, validations, _Kept(folder, config)).run(settings.pre_iterations)


def self_train(
    learners: Learners,
    streams: Streams,
    folder: Path,
    settings: Settings,
    *,
    validate: Validate | None,
    validate_at: Collection[int],
    validated_on: str,
    config: dict[str, Any],
    start_from: Literal["best", "last"],
    pretrained: Path | None = None,
) -> None:
    """Run stage 2 to its end: from stage 1's checkpoints, or from where the run's folder left it.

    Args:
        learners: the students; a teacher is added, and averages where the settings ask for them; changed in place.
        streams: batches of two labelled and two unlabelled streams.
        folder: the run's folder; this stage writes into its self_train/.
        settings: the script's header; its `method` names what stage 2 is.
        validate: scores a stage's predictors; None: nothing is validated or selected.
        validate_at: iterations (from 1) after which to validate; the last one always is.
        validated_on: the name of what validate scores on, "val" or "test"; logs and columns carry it.
        config: kept in each checkpoint.
        start_from: stage 1's checkpoints to start from: each student's best, or the last.
        pretrained: another run's folder, to start from its stage 1.

    Raises:
        UserError: stage 1 left no checkpoint, or as in pretrain().
    """
    method, stage = get(settings.method), folder / "self_train"
    saves = [stage / name for name in (checkpoints.LAST, checkpoints.PREVIOUS)]
    if not first(lambda: any(path.exists() for path in saves)):
        begin = (pretrained or folder) / "pre_train"
        if start_from == "best":
            first(lambda: checkpoints.check_best(begin, method.students))
        names = {"best": [f"best_{role}.pth" for role in method.students], "last": [checkpoints.LAST]}[start_from]
        for path in (begin / name for name in names):
            learners.load(first(lambda path=path: checkpoints.load(path)), path)
    learners.best, learners.iteration = {}, 0
    learners.keep(method.students)
    if method.has_teacher:
        add_teacher(learners)
    if settings.average_decay:
        add_averages(learners)
    validations = _Validations(validate, validate_at, validated_on)
    _Loop("self_train", learners, streams, settings, validations, _Kept(folder, config)).run(settings.self_iterations)


def validation_iterations(first: int, every: int, last: int) -> range:
    """Return the iterations after which to validate: first, then every so many; none for every = 0."""
    return range(first or every, last + 1, every) if every else range(0)


def iteration_seed(seed: int, stage: Stage, iteration: int, rank: int = 0) -> int:
    """Derive one iteration's seed, so that its randomness depends on nothing that came before it.

    Args:
        seed: the run's.
        stage: which.
        iteration: from 1.
        rank: of a process; each draws its own dropout and noise.
    """
    entropy = [seed, ("pre_train", "self_train").index(stage), iteration, *([rank] if rank else [])]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to the device without waiting for it; pinned tensors then arrive while the device computes."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


@dataclass(frozen=True)
class _Validations:
    """What scores the students (None: nothing does), after which iterations, and on what: "val" or "test"."""

    score: Validate | None
    at: Collection[int]
    on: str


@dataclass(frozen=True)
class _Kept:
    """The run's folder, and the configuration that each of its checkpoints keeps."""

    folder: Path
    config: dict[str, Any]


class _Loop:
    """One stage's loop: resume, step, record, validate, save."""

    def __init__(
        self,
        stage: Stage,
        learners: Learners,
        streams: Streams,
        settings: Settings,
        validations: _Validations,
        kept: _Kept,
    ):
        self.stage, self.learners, self.streams, self.settings = stage, learners, streams, settings
        method = get(settings.method)
        if stage == "pre_train":  # the same for all methods
            self.step, self.parts, self.totals = method.pretrain_step, ("dice", "ce"), ()
            self.predictors = PREDICTORS
        else:
            self.step, self.parts, self.totals = method.self_train_step, method.parts, method.totals
            self.predictors = averaged(method.predictors, settings.average_decay)
        self.folder, self.config, self.validations = kept.folder / stage, kept.config, validations
        self.device = next(learners.networks["student_a"].parameters()).device
        if settings.compile:
            compile_networks(learners.networks.values(), self.device)
        self.unread: list[tuple[int, Losses]] = []  # losses that are still on the device
        self.told_cost = False  # of saving
        self.seconds: list[float] = []
        self.begun_at = 0  # the iteration that this process goes on from
        self.shown: dict[str, str] = {}  # the last validation, beside the losses in the progress bar

    def run(self, iterations: int) -> None:
        """Train until so many iterations are done."""
        note = resume(self.learners, self.folder, self.config, self.predictors)
        start = self.begun_at = self.learners.iteration
        if start >= iterations:
            LOGGER.info("%s: all %d iterations are done already", self.stage, start)
            self._warn_of_lost_best()
            return
        first(lambda: checkpoints.check_best(self.folder, self.learners.best))
        record = StageRecord(self.folder, self._columns(), start + 1) if is_first() else NoRecord()
        self.record = record
        if note:
            LOGGER.warning("%s: %s", self.stage, note)
        LOGGER.info("%s: iterations %d to %d in %s", self.stage, start + 1, iterations, self.folder)
        # Where nobody watches a bar, a line at each reading of the losses tells as much.
        hidden = None if is_first() else True
        to_record = self.learners.networks.values() if records_passes(self.settings, self.device) else ()
        bar = tqdm(total=iterations, initial=start, desc=self.stage, unit="it", dynamic_ncols=True, disable=hidden)
        try:
            with StopRequest() as stop, recorded(to_record):
                self.clock = self.saved_at = time.perf_counter()
                for batch in self._timed(self.streams.batches(start, iterations)):
                    if code := self._iterate(batch, iterations, record, bar, stop):
                        break
                else:
                    (code,) = agree(stop.code)
                if code:
                    LOGGER.info("%s: stopped and saved after iteration %d", self.stage, self.learners.iteration)
                    wait()  # a process that ends has torchrun end the others
                    part()
                    sys.exit(code)
        finally:
            bar.close()
            record.close()

    def _iterate(
        self, batch: Batch, iterations: int, record: StageRecord | NoRecord, bar: tqdm, stop: StopRequest
    ) -> int:
        """Do one iteration; return the status to end with where it was saved because somebody asked to stop, else 0."""
        number = self.learners.iteration + 1
        torch.manual_seed(iteration_seed(self.settings.seed, self.stage, number))
        self._set_modes()
        mask = self._mask(batch["x_a"].shape[2:])
        if ranks.rank():  # the mask is everybody's
            torch.manual_seed(iteration_seed(self.settings.seed, self.stage, number, ranks.rank()))
        # Stage 1's rate does not fall: short ones learn until their end, and self-training goes on from there.
        schedule = "constant" if self.stage == "pre_train" else self.settings.lr_schedule
        self.learners.set_rate(share(number, iterations, schedule, self.settings.warmup))
        losses = self.step(self.learners, to_device(batch, self.device), mask, self.settings)
        if self.stage == "self_train" and self.settings.average_decay:
            move_averages(self.learners, self.settings.average_decay)
        self._check_names(losses)
        self.unread.append((number, losses))
        self.learners.iteration = number
        # Looked at once, and by all processes together: what comes later is for the next iteration.
        code, is_due = agree(stop.code, int(self._is_due()))
        is_last = number == iterations
        is_validated = self.validations.score is not None and (is_last or number in self.validations.at)
        is_saved = is_last or is_validated or code or number % self.settings.save_every == 0 or is_due
        if is_saved:
            first(self._check_folder)
        if is_saved or number % self.settings.log_every == 0 or number - self.begun_at in (1, MEASURED):
            rows = self._read_losses()
            if is_saved:
                self._check_weights()
            scores = self._validate(record) if is_validated else {}
            rows[-1] |= {f"{self.validations.on}_dice/{name}": value for name, value in scores.items()}
            record.add(rows)
            if number == self.begun_at + MEASURED and not is_last:
                self._tell_end(iterations - number)
            is_due_to_log = number % self.settings.log_every == 0 and bar.disable
            self._show(bar, rows[-1], scores, is_logged=is_saved or is_due_to_log)
        if is_saved:
            record.flush()
            self._save()
        if not self.unread:
            self.clock = time.perf_counter()  # validating and saving do not count as training
        if is_last:
            self._log_cost()
        bar.update()
        return code

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, and say once where preparing them is what the run waits for."""
        waits, wholes, last = [], [], time.perf_counter()
        for _ in range(WATCHED):
            is_at_work = self._ask_device()
            begin = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            now = time.perf_counter()
            waits.append(0.0 if is_at_work() else now - begin)
            wholes.append(now - last)
            last = now
            yield batch
        share = float(np.median(np.divide(waits, wholes)))  # the first batches decode files, some iterations validate
        if share > MUCH:
            LOGGER.info(
                "NOTE: %s waits for batches for %.0f %% of its time: more --workers prepare them in processes of their "
                "own.", self.stage, 100 * share,
            )  # fmt: skip
        yield from batches

    def _ask_device(self) -> Callable[[], bool]:
        """Return what tells whether a GPU has yet to finish what is queued now; while it works nothing waits."""
        if self.device.type != "cuda":
            return lambda: False
        with torch.cuda.device(self.device):
            done = torch.cuda.Event()
            done.record()
        return lambda: not done.query()

    def _set_modes(self) -> None:
        for role, network in self.learners.networks.items():
            network.train()  # the teacher too: its dropout is on and its BatchNorm uses the batch
            if role == TEACHER and self.settings.teacher_dropout == "no":
                for module in network.modules():
                    if isinstance(module, nn.Dropout | nn.Dropout3d):
                        module.eval()

    def _mask(self, shape: Sequence[int]) -> Tensor:
        """Draw an iteration's mask (*S); without pasting it keeps every voxel."""
        fraction = self.settings.mask_fraction
        if fraction:
            return copy_paste_mask(shape, box_size(shape, fraction), device=self.device)
        return torch.ones(*shape, dtype=torch.bool, device=self.device)

    def _warn_of_lost_best(self) -> None:
        """Say that a finished stage has lost a best checkpoint, which what comes after it may well do without."""
        try:
            first(lambda: checkpoints.check_best(self.folder, self.learners.best))
        except UserError as error:
            LOGGER.warning("WARNING: %s", error)

    def _columns(self) -> list[str]:
        columns = [f"{r}/{part}" for r in self.learners.optimisers for part in ("loss", *self.parts, "grad_norm")]
        scores = [f"{self.validations.on}_dice/{name}" for name in self.predictors]
        return ["iteration", *columns, *self.totals, *scores]

    def _check_names(self, losses: Losses) -> None:
        """Refuse a step that names other losses than its method says, or forgets to move a student."""
        needed = {f"{role}/{part}" for role in self.learners.optimisers for part in ("loss", "grad_norm")}
        named = f"the step of sdcl/methods/{self.settings.method}.py names"
        if missing := sorted(needed - set(losses)):
            raise UserError(f"{named} no {', '.join(missing)}: end it with `return named | descend(learners, named)`.")
        if unknown := sorted(set(losses) - set(self._columns())):
            raise UserError(f"{named} {', '.join(unknown)}, which its METHOD lacks: add them to its parts or totals.")

    def _read_losses(self) -> list[dict[str, float]]:
        """Fetch the losses that wait on the device, in one copy, and stop the run where one is not finite."""
        values = torch.stack([torch.stack([v.float() for v in losses.values()]) for _, losses in self.unread]).tolist()
        rows = []
        for (number, losses), numbers in zip(self.unread, values, strict=True):
            row = {"iteration": number} | dict(zip(losses, numbers, strict=True))
            wrong = [name for name, value in row.items() if not math.isfinite(value)]
            if wrong:
                raise self._broken(number, wrong)
            rows.append(row)
        # Reading waited for the device, so that this is the whole time, waiting for data included.
        self.seconds += [(time.perf_counter() - self.clock) / len(rows)] * len(rows)
        self.unread.clear()
        return rows

    def _check_weights(self) -> None:
        """Stop the run before weights or statistics that are not finite replace the last checkpoint."""
        for role, network in self.learners.networks.items():
            if not all(bool(torch.isfinite(value).all()) for value in network.state_dict().values()):
                raise self._broken(self.learners.iteration, [f"weights of {role}"])
        check_weights(self.learners.networks.values())

    def _check_folder(self) -> None:
        """Stop the run where its folder is no longer the one that its records go to."""
        if not self.record.is_in(self.folder):
            raise UserError(
                f"{self.folder} was moved, removed or replaced during training; nothing more is saved: move it back "
                "and give the same command again, which goes on from the last save."
            )

    def _broken(self, number: int, wrong: list[str]) -> UserError:
        """Save the state for inspection and return what to tell of an iteration with values that are not finite."""
        cases = self.streams.names(number - 1)
        path = self.folder / f"nonfinite_{number}.pth"
        first(self._check_folder)
        if is_first():
            checkpoints.save(self._payload() | {"iteration": number, "wrong": wrong, "cases": cases}, path)
        wait()
        batch = "; ".join(f"{stream}: {', '.join(names)}" for stream, names in cases.items())
        is_saved = any((self.folder / name).exists() for name in (checkpoints.LAST, checkpoints.PREVIOUS))
        kept = f"{self.folder} keeps the last finite checkpoint" if is_saved else f"nothing of {self.stage} was saved"
        again = "Another --base_lr needs another --exp."
        if self.stage == "self_train":
            begin = getattr(self.settings, "pretrained", None) or self.folder.parent
            again = f"To start self-training again from its stage 1, give another --exp and --pretrained {begin}."
        return UserError(
            f"{', '.join(wrong)} became nan or infinite at iteration {number} of {self.stage}, on the cases {batch}: "
            f"lower --base_lr or check these cases; {kept}, {path.name} holds this state. {again}"
        )

    def _is_due(self) -> bool:
        """Tell whether so many minutes have passed since the last save."""
        minutes = self.settings.save_minutes
        return bool(minutes) and time.perf_counter() - self.saved_at >= 60 * minutes

    def _save(self) -> None:
        """Save everything with state; once, say what that costs."""
        if not is_first():
            self.saved_at = time.perf_counter()
            return
        begin, path = time.perf_counter(), self.folder / checkpoints.LAST
        checkpoints.save(self._payload(), path, previous=self.folder / checkpoints.PREVIOUS)
        self.saved_at = time.perf_counter()
        if not self.told_cost:
            self.told_cost = True
            LOGGER.info(
                "%s: saving took %.2f s, %.1f MiB (the one before is kept too)",
                self.stage, self.saved_at - begin, path.stat().st_size / 2**20,
            )  # fmt: skip

    def _validate(self, record: StageRecord) -> dict[str, float]:
        predictors = Predictors.of(self.learners.networks, self.predictors)
        for network in predictors.networks:
            network.eval()
        validation = self.validations.score(predictors)
        number = self.learners.iteration
        for name, dice in validation.dice.items():
            if dice > self.learners.best.get(name, {"dice": -1.0})["dice"]:
                self.learners.best[name] = {"dice": dice, "iteration": number}
                if is_first():
                    checkpoints.save(self._payload(self.predictors[name]), self.folder / f"best_{name}.pth")
        if validation.panel is not None:
            record.add_image(f"{self.validations.on} cases", validation.panel, number)
        best = self.learners.best
        scores = [
            f"{n} {dice:.4f} (best {best[n]['dice']:.4f} at {best[n]['iteration']})"
            for n, dice in validation.dice.items()
        ]
        cases = "the TEST cases (the published selection)" if self.validations.on == "test" else "validation cases"
        LOGGER.info("%s %d: Dice on %s: %s", self.stage, number, cases, ", ".join(scores))
        return validation.dice

    def _show(self, bar: tqdm, row: dict[str, float], scores: dict[str, float], is_logged: bool) -> None:
        self.shown |= {f"{self.validations.on}_{name}": f"{value:.3f}" for name, value in scores.items()}
        losses = {role: f"{row[f'{role}/loss']:.4f}" for role in self.learners.optimisers}
        bar.set_postfix(losses | self.shown)
        if is_logged:
            pace = float(np.median(self.seconds[-self.settings.log_every :]))
            named = ", ".join(f"{role} {loss}" for role, loss in losses.items())
            LOGGER.info("%s %d: loss %s; %.3f s an iteration", self.stage, row["iteration"], named, pace)

    def _payload(self, roles: Collection[str] | None = None) -> dict[str, Any]:
        return self.learners.state(roles) | {"stage": self.stage, "config": self.config}

    def _tell_end(self, left: int) -> None:
        """Say how long the stage will take, by its first iterations but the very first, which is slower."""
        seconds = self.seconds[-1] * left
        ends = time.strftime("%a %H:%M", time.localtime(time.time() + seconds))
        LOGGER.info(
            "%s: about %s for %d more iterations, validations apart, so until %s",
            self.stage, duration(seconds), left, ends,
        )  # fmt: skip

    def _log_cost(self) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_reserved(self.device) / 2**30  # graphs hold what counts as free between them
        else:
            peak = peak_memory_gib()
        LOGGER.info(
            "%s: %.3f s an iteration (median of %d, validation apart), peak memory %.2f GiB",
            self.stage, float(np.median(self.seconds)), len(self.seconds), peak,
        )  # fmt: skip


def peak_memory_gib() -> float:
    """Return this process's peak resident memory in GiB; nan where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return math.nan
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
