"""From the values in label files to the classes 1, 2, ...: chosen, merged, left out; nothing without a word."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dataloaders.scans.dicom_labels import segment_names, segmentation_in
from dataloaders.scans.reading import read_label
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

MAX_VALUE = 65_535  # of a label
LEAST_COUNTS, LEAST_INSTANCES = 3, 4  # from which numbers 1 to N look like those of instances
MAX_CLASSES = 255  # that a converted file's uint8 can hold


@dataclass(frozen=True)
class LabelMap:
    """How the values in label files become classes.

    Attributes:
        values: class k is the value values[k - 1]; (): not chosen yet.
        merge: value to the value that it counts as, before anything else.
        ignore: values that become background.
    """

    values: tuple[int, ...] = ()
    merge: tuple[tuple[int, int], ...] = ()
    ignore: tuple[int, ...] = ()

    @classmethod
    def of(cls, values: Sequence[int], merge: Sequence[str], ignore: Sequence[int]) -> "LabelMap":
        """Make it of the flags `--label_values 5 7 --merge 6:5 --ignore 9`.

        Raises:
            UserError: a number is none of a label's, or flags contradict each other.
        """
        pairs = tuple(_pair(text) for text in merge)
        for flag, numbers in (("label_values", values), ("ignore", ignore), ("merge", sum(pairs, ()))):
            is_twice = flag != "merge" and len(set(numbers)) < len(numbers)
            if is_twice or not all(1 <= number <= MAX_VALUE for number in numbers):
                shown = " ".join(map(str, merge if flag == "merge" else numbers))
                raise UserError(f"--{flag} {shown} must be different numbers from 1 to {MAX_VALUE}.")
        gone = [first for first, _ in pairs]
        both = next((n for n in gone if gone.count(n) > 1 or n in [second for _, second in pairs] or n in ignore), None)
        if both is not None:
            raise UserError(f"--merge says twice, or together with --ignore, what {both} becomes: say it once.")
        for flag, numbers in (("--merge", gone), ("--ignore", ignore)):
            kept = next((n for n in numbers if n in values), None)
            if kept is not None:
                raise UserError(f"{flag} takes the value {kept} away, which --label_values names: name it in one.")
        strange = next((second for _, second in pairs if second in ignore or (values and second not in values)), None)
        if strange is not None:
            raise UserError(f"--merge makes values {strange}, which is to become no class: add it to --label_values.")
        return cls(tuple(values), pairs, tuple(ignore))

    def kept(self, array: np.ndarray) -> np.ndarray:
        """Return a label map's values after merging and leaving out, of the array's shape."""
        table = np.arange(MAX_VALUE + 1, dtype=np.uint16)
        for first, second in self.merge:
            table[first] = second
        table[list(self.ignore)] = 0
        return table[array]

    def classes(self, array: np.ndarray) -> np.ndarray:
        """Return a label map's classes, uint8 of the array's shape; values that are no class's are background."""
        table = np.zeros(MAX_VALUE + 1, np.uint8)
        table[list(self.values)] = range(1, len(self.values) + 1)
        return table[self.kept(array)]

    def to_json(self) -> str:
        """Return the fields as JSON, as converted files' attributes keep them."""
        return json.dumps({"values": self.values, "merge": dict(self.merge), "ignore": self.ignore})


@dataclass(frozen=True)
class ChosenLabels:
    """What the label files of an import hold.

    Attributes:
        label_map: how their values become classes.
        healthy: cases whose label has no foreground.
    """

    label_map: LabelMap
    healthy: tuple[str, ...]


def _pair(text: str) -> tuple[int, int]:
    first, colon, second = text.partition(":")
    if not (colon and first.isdecimal() and second.isdecimal() and first != second):
        raise UserError(f"--merge {text} is no pair of numbers: give 5:1 to count the value 5 as 1.")
    return int(first), int(second)


def choose_values(
    labels: Mapping[str, Path], how: LabelMap, names: Sequence[str], workers: int, described_by: Path | None = None
) -> ChosenLabels:
    """Read all label files, complete the values that become the classes 1, 2, ..., and say what becomes what.

    Args:
        labels: case to label file.
        how: from the flags.
        names: of the classes, or () for class1, class2, ...
        workers: files at a time.
        described_by: the file that names the values, such as nnU-Net's dataset.json; None: the flags do.

    Raises:
        UserError: without a choice several values are not 1, 2, ...; a file holds others than those chosen, or nothing
            but what is left out; or there are not as many names.
    """
    with ThreadPoolExecutor(workers) as pool:
        raw = list(pool.map(lambda path: _values(read_label(path, may_be_empty=True).array), labels.values()))
    found = [set(_values(how.kept(np.array(sorted(there), int)))) for there in raw]
    values = list(how.values) or sorted(set().union(*found))
    if labels and not any(raw):
        raise UserError(f"none of the {len(raw)} labels has any foreground: give the folder of the labels.")
    # A single value needs no order: it is the foreground, whatever its number, and is said below.
    if not how.values and len(values) > 1 and values != list(range(1, len(values) + 1)):
        raise UserError(
            f"the labels hold the values {values}, not 1, 2, ...: give --label_values {' '.join(map(str, values))} "
            "to number them so (--merge counts one as another, --ignore leaves one out), or correct the files."
        )
    if len(values) > MAX_CLASSES:
        raise UserError(
            f"the labels have {len(values)} values, and {MAX_CLASSES} classes fit at most: give --merge or --ignore, "
            "or the files of the labels, not of the images."
        )
    for path, there, before in zip(labels.values(), found, raw, strict=True):
        if not there <= set(values):
            strange = min(there - set(values))
            if described_by is not None:
                raise UserError(
                    f"{path} holds the label {strange}, which {described_by} does not name: add it to the labels "
                    "there, or correct the file."
                )
            raise UserError(
                f"{path} holds the label {strange}, which --label_values does not name: add it there, to --merge or "
                "to --ignore."
            )
        if before and not there:
            raise UserError(
                f"{path} holds nothing but {', '.join(map(str, sorted(before)))}, which --ignore leaves out: move the "
                "label away, and the scan counts as unlabelled."
            )
    if names and len(names) != len(values):
        raise UserError(f"--class_names gives {len(names)} names for the {len(values)} label values {values}: "
                        "name each one.")  # fmt: skip
    if not how.values:
        _tell_instances(raw)
    healthy = tuple(case for case, before in zip(labels, raw, strict=True) if not before)
    if healthy:
        LOGGER.info(
            "NOTE: %d of %d labels have no foreground (healthy cases); they train and are scored as labelled cases: %s",
            len(healthy), len(labels), ", ".join(healthy),
        )  # fmt: skip
    _tell(replace(how, values=tuple(values)), names or class_names(values), raw, found)
    return ChosenLabels(replace(how, values=tuple(values)), healthy)


def _tell_instances(raw: Sequence[set[int]]) -> None:
    """Note where values look like the numbers of instances, 1 to N with another N in each file."""
    counts = {len(there) for there in raw if there}
    are_counted = all(there == set(range(1, len(there) + 1)) for there in raw)
    if are_counted and len(counts) >= LEAST_COUNTS and max(counts) >= LEAST_INSTANCES:
        LOGGER.warning(
            "NOTE: the labels hold 1 to N, with N from %d to %d by case, as if they numbered instances (lesions, "
            "cells). Each number becomes a class; if they are instances, count them as one: --merge 2:1 3:1 ...",
            min(counts), max(counts),
        )  # fmt: skip


def class_names(values: Sequence[int]) -> list[str]:
    """Return the names of classes that have none."""
    return [f"class{k}" for k in range(1, len(values) + 1)]


def name_classes(labels: Mapping[str, Path], how: LabelMap, given: Sequence[str]) -> list[str]:
    """Return the classes' names: those given, else what DICOM segmentations call the segments, else class1, class2, ...

    Args:
        labels: case to label file.
        how: with the values that become the classes.
        given: from the command line, or ().

    Raises:
        UserError: none are given, and segmentations call the same number differently.
    """
    called: dict[int, dict[str, tuple[str, Path]]] = {}  # number, name in small letters: name and its first file
    for path in filter(None, map(segmentation_in, labels.values())):
        for number, name in segment_names(path).items():
            called.setdefault(number, {}).setdefault(name.casefold(), (name, path))
    for number in (*how.values, *(first for first, _ in how.merge)):
        if len(names := list(called.get(number, {}).values())) > 1:
            (one, path), (other, where), *_ = names
            told = f"the segment {number} is {one or 'unnamed'} in {path}, {other or 'unnamed'} in {where}"
            if not given:
                raise UserError(f"{told}: number them alike, or give --class_names if they are the same structure.")
            LOGGER.info("NOTE: %s; --class_names says that they are the same structure", told)
    if given:
        return list(given)
    found = [next(iter(called.get(value, {"": ("", None)}).values()))[0] for value in how.values]
    if not all(found) or len(set(found)) < len(found):
        return class_names(how.values)
    LOGGER.info("the classes are called as the segmentations call them: %s", ", ".join(found))
    return found


def _values(array: np.ndarray) -> set[int]:
    return set(np.unique(array).tolist()) - {0}


def _tell(how: LabelMap, names: Sequence[str], raw: Sequence[set[int]], found: Sequence[set[int]]) -> None:
    for k, (name, value) in enumerate(zip(names, how.values, strict=True), start=1):
        count = sum(value in there for there in found)
        LOGGER.info("class %d, %s: the label %d, in %d of %d labels%s", k, name, value, count, len(found),
                    "" if count else ": nothing teaches the networks this class")  # fmt: skip
    for flag, value, then in (
        *(("--merge", first, f"counts as {second}") for first, second in how.merge),
        *(("--ignore", value, "becomes background") for value in how.ignore),
    ):
        count = sum(value in there for there in raw)
        LOGGER.info("%s: the label %d %s, in %d of %d labels", flag, value, then, count, len(raw))
