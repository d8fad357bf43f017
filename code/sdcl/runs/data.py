"""What an experiment asks of a data set: one object for a script's header and the data that it names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from sdcl.scoring.evaluation import Case, Task

Stage = Literal["pre_train", "self_train"]


@dataclass(frozen=True)
class Training:
    """What both stages read, checked whole.

    Attributes:
        task: what the data set fixes, with how to predict for validation.
        streams: makes a stage's batches.
        lists: names of the cases that the run reads, by what they are for: a run does not go on with others.
        trained_on: the training cases, as tests name them: a test says which of its cases are among them.
        validation_cases: volumes to validate on, which may be read as they are asked for; none: nothing is validated or
            selected.
        validated_on: their name, "val" or "test".
        facts: what config.json keeps of the data set, under "task".
        waiting_bytes: memory that data will take beside what they take already, since they are decoded when first used.
        keep: called with the run's folder once everything has passed and the folder is this process's, to keep there
            what a later start or this run itself finds useful; nothing needs it.
    """

    task: Task
    streams: Callable[[Stage], Any]
    lists: Mapping[str, Sequence[str]]
    trained_on: Sequence[str]
    validation_cases: Sequence[Case]
    validated_on: str
    facts: dict[str, Any]
    waiting_bytes: int = 0
    keep: Callable[[Path], None] = lambda folder: None


@dataclass(frozen=True)
class Scoring:
    """What a test scores.

    Attributes:
        task: what the data set fixes, with how to predict.
        read_cases: reads the volumes, once the networks are there.
        split: the volumes' name.
        facts: what the data set says of these files, to compare with what the run was trained on.
    """

    task: Task
    read_cases: Callable[[], Sequence[Case]]
    split: str
    facts: dict[str, Any]


class Data(Protocol):
    """A data set together with a script's header, which says what to read of it and how."""

    name: str

    def check_root(self) -> None:
        """Refuse a folder that does not hold the data set.

        Raises:
            UserError: says what is missing.
        """
        ...

    def check(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            UserError: names the flags.
        """
        ...

    def training(self, needs_unlabelled: bool = True) -> Training:
        """Read and check what training needs.

        Args:
            needs_unlabelled: self-training cannot do without unlabelled cases.

        Raises:
            UserError: a list or file is missing or wrong.
        """
        ...

    def scoring(self, trained: dict[str, Any]) -> Scoring:
        """Say what a test scores.

        Args:
            trained: the settings that the run was trained with.

        Raises:
            UserError: the run's networks do not fit the data, or a list is missing.
        """
        ...
