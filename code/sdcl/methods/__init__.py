"""The methods, one file each: which networks they train, by what they are scored, and their step."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from torch import Tensor

from sdcl.runs.config import method_names
from sdcl.runs.errors import UserError
from sdcl.steps import TEACHER, Batch, Learners, Losses, Settings, pretrain_step

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
        UserError: there is none of that name.
    """
    if name not in method_names():
        raise UserError(f"--method {name} is not known: choose {', '.join(method_names())}.")
    return importlib.import_module(f"sdcl.methods.{name}").METHOD


def check_settings(config: Any) -> None:
    """Refuse a header in which a field was changed that its method does not read.

    Raises:
        UserError: names the flag and the methods that read it.
    """
    method = get(config.method)
    readers: dict[str, list[str]] = {}
    for other in map(get, method_names()):
        for field in other.reads:
            readers.setdefault(field, []).append(other.name)
    for field in fields(config):
        is_changed = field.default not in (None, MISSING) and getattr(config, field.name) != field.default
        if is_changed and field.name in readers and method.name not in readers[field.name]:
            raise UserError(
                f"--{field.name} is not read by --method {method.name}, only by {', '.join(readers[field.name])}: "
                "leave it out, or choose one of these."
            )
