"""The methods, one file each: which networks they train, by what they are scored, and their step."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from torch import Tensor

from sdcl.runs.config import METHODS, method_names, recipe_of
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER
from sdcl.steps import TEACHER, Batch, Learners, Losses, Settings, pretrain_step

# Fields that stage 1 reads.
STAGE_ONE = ("pre_iterations", "pre_dice", "pre_val_from", "pre_val_every", "mask_fraction", "foreground_prior")
Step = Callable[[Learners, Batch, Tensor, Settings], Losses]


@dataclass(frozen=True)
class Method:
    """What the loop asks of a method; stage 1 is the same for all of them.

    Attributes:
        name: of its file, and after --method.
        title: what it is, in a line.
        students: the roles that stage 2 trains; stage 1 trains both students for all methods.
        predictors: what is scored: a name to the roles whose probabilities are averaged. The last one is the method's
            own answer: pictures, NIfTI files and predictions are of it.
        self_train_step: stage 2's step: learners, batch, mask (*S), settings to named losses; see steps.mixed_step().
        parts: the losses of each student that it names beside "loss" and "grad_norm".
        totals: the other numbers that it names.
        reads: header fields that stage 2 reads, beside those that all methods read; other methods' are refused where
            they are changed.
        passes: of networks over one batch in an iteration, the teacher's in brackets.
        needs_unlabelled: it cannot do without unlabelled cases.
        spans_ranks: several processes can share a batch: all that its losses say of it goes through mixed_losses() or
            sdcl.ranks (docs/scaling.md).
        pretrain_step: stage 1's step.
    """

    name: str
    title: str
    students: tuple[str, ...]
    predictors: Mapping[str, tuple[str, ...]]
    self_train_step: Step
    parts: tuple[str, ...] = ("dice", "ce")
    totals: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    passes: str = ""
    needs_unlabelled: bool = True
    spans_ranks: bool = False
    pretrain_step: Step = pretrain_step

    @property
    def roles(self) -> tuple[str, ...]:
        """The networks that stage 2 has: the students, and the teacher where one is scored or read."""
        return (*self.students, TEACHER) if self.has_teacher else self.students

    @property
    def has_teacher(self) -> bool:
        """Tell whether there is an EMA teacher: "ema_decay" is read."""
        return "ema_decay" in self.reads


def get(name: str) -> Method:
    """Return a method by the name of its file in sdcl/methods/.

    Raises:
        UserError: there is none of that name, or its file is none of a method.
    """
    if name not in method_names():
        raise UserError(f"--method {name} is not known: choose {', '.join(method_names())}.")
    path = METHODS / f"{name}.py"
    try:
        found = importlib.import_module(f"sdcl.methods.{name}").METHOD
    except Exception as error:  # whatever a file of one's own raises
        raise UserError(f"{path} cannot be read as a method ({type(error).__name__}: {error}): correct it.") from error
    if found.name != name:
        raise UserError(f"{path} calls its method {found.name}: its name must be the file's, {name}.")
    return found


# Published values of the fields that only some methods read. A script's PUBLISHED adds those that data sets differ in.
PUBLISHED = {
    "mask_fraction": 2 / 3, "u_weight": 0.5, "correct": "discrepancy", "mse_weight": 0.5, "kl_weight": 0.05,
    "largest_component": "yes", "teacher_dropout": "yes", "ema_decay": 0.99, "ema_warmup": False,
    "consistency_weight": 0.1, "rampup": None, "noise": 0.1, "passes": 8, "paste": "yes",
}  # fmt: skip
# What makes other fields idle: a field, its value, and those that nothing reads then.
IDLE = (
    ("correct", "none", ("mse_weight", "kl_weight")),
    ("largest_component", "no", ("connectivity",)),
    ("dropout", 0.0, ("teacher_dropout",)),
)


def check_settings(config: Any, filled: Collection[str] = ()) -> None:
    """Refuse a header in which a field was changed that its method does not read, and tell of what stage 1 alone reads.

    An edited header default counts as changed, as a flag does.

    Args:
        config: the header; a field counts as changed if its value is neither the published nor a recipe's.
        filled: fields that the script fills in where they are None.

    Raises:
        UserError: names the flag and the methods that read it.
    """
    method, readers = get(config.method), _readers()
    header = {field.name: field.default for field in fields(config)}
    published = PUBLISHED | getattr(sys.modules[type(config).__module__], "PUBLISHED", {})
    header |= {name: value for name, value in published.items() if name in header}
    if unknown := [name for name in method.reads if name not in header]:
        raise UserError(f"{METHODS / method.name}.py reads {', '.join(unknown)}, which no header field is called.")
    named = recipe_of(config)  # whose values serve the methods that read them
    given = {name: value for name, value in vars(config).items() if (name, value) not in named.items()}
    changed = [n for n, d in header.items() if d is not MISSING and given.get(n, d) != d and n not in filled]
    for name in (name for name in changed if name in readers and name not in STAGE_ONE):
        if name not in method.reads:
            raise UserError(
                f"--{name} is not read by --method {method.name}, only by {', '.join(readers[name])}: "
                "leave it out, or choose one of these."
            )
    for field, value, others in IDLE:
        if getattr(config, field) == value and (named := [name for name in others if name in changed]):
            raise UserError(f"--{named[0]} does nothing with --{field} {value}: leave one of them out.")
    if "noise" in method.reads and config.ema_buffers is False and len(config.patch_size or ()) == 2:
        LOGGER.warning(
            "NOTE: without --ema_buffers the teacher's BatchNorm statistics are those of its noisy passes, which spoil "
            "its scores (docs/methods.md)."
        )
    idle = [f"--{name}" for name in changed if name in STAGE_ONE and name not in method.reads]
    if idle and config.pretrained is not None:
        LOGGER.info("NOTE: %s: of stage 1, which --pretrained brings: nothing reads it here.", ", ".join(idle))


def _readers() -> dict[str, list[str]]:
    """Return the header fields that some methods read, to those methods; files that are broken say so when chosen."""
    readers: dict[str, list[str]] = {}
    for name in method_names():
        with contextlib.suppress(UserError):
            for field in get(name).reads:
                readers.setdefault(field, []).append(name)
    return readers
