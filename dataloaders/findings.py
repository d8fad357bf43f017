"""What the doctor of a data set finds of all files together: doubles, classes without a label, strangers, kinds."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dataloaders.datasets import SLICE, DataSet, Duplicate, missing_classes, texts_of
from dataloaders.own import DESCRIPTION
from dataloaders.scans.convert import few
from dataloaders.voxel_sides import unlike_cases
from sdcl.runs.errors import UserError

if TYPE_CHECKING:  # it imports PyTorch, for which a wrong flag need not wait
    from sdcl.scoring.evaluation import Case


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what it is of, what kind it is, and the sentence."""

    name: str
    kind: str
    text: str


@dataclass
class Finding:
    """What one file is found to be.

    Attributes:
        name: in the lists.
        split: the list that names it.
        path: of the file.
        problem: what is wrong with it, or "".
        hu_fault: why the image was no CT in HU before it was mapped to [0, 1], or "".
        is_hu_trusted: it was imported with --trust_hu.
        case: what was read, of a volume that is to be drawn.
    """

    name: str
    split: str
    path: Path
    problem: str = ""
    shape: tuple[int, ...] = ()
    classes: frozenset = frozenset()
    num_bytes: int = 0
    content: str = ""
    spacing: tuple[float, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    is_labelled: bool = False
    hu_fault: str = ""
    is_hu_trusted: bool = False
    case: "Case | None" = field(default=None, repr=False)

    @property
    def is_constant(self) -> bool:
        """Tell whether the image is one value."""
        return bool(self.shape) and self.low == self.high

    @property
    def case_name(self) -> str:
        """Return the case's name, of a slice without its number."""
        return self.name.rsplit(SLICE, 1)[0]


def doubles(findings: Sequence[Finding], data_set: DataSet) -> tuple[list[Problem], Counter[Duplicate]]:
    """Find the cases that two splits share, by name, by patient or by content, and equal files within one.

    Returns:
        What is wrong; and how many files are equal as the collection is known to hold them, in one and the same split.
    """
    problems, known, seen = [], Counter(), {}
    for finding in findings:
        if not finding.content or finding.is_constant:
            continue
        other = seen.setdefault(finding.content, finding)
        if other is finding:
            continue
        pair = {data_set.patient_of(other.name), data_set.patient_of(finding.name)}
        duplicate = next((d for d in data_set.duplicates if pair <= set(d.patients)), None)
        if duplicate is not None and other.split == finding.split:
            known[duplicate] += 1
            continue
        where = "both " + finding.split if other.split == finding.split else f"{other.split} and {finding.split}"
        text = f"{other.name} and {finding.name} hold the same image ({where}): take one out"
        problems.append(Problem(finding.name, f"the same image, {where}", text))
    patients: dict[str, set[str]] = {}
    for finding in findings:
        patients.setdefault(data_set.patient_of(finding.name), set()).add(finding.split)
    for patient, splits in patients.items():
        if len(splits) > 1:
            where = " and ".join(sorted(splits))
            problems.append(Problem(patient, f"in {where}", f"{patient} is in {where}: take it out of one"))
    for duplicate in data_set.duplicates:
        if duplicate.is_one_enough and set(duplicate.patients) & set(patients):
            known[duplicate] += 0
    return problems, known


def labels_of(findings: Sequence[Finding], data_set: DataSet) -> tuple[str, list[Problem]]:
    """Count the labelled training cases of each class, and name classes and cases that teach nothing."""
    cases: dict[str, set[int]] = {}
    for finding in findings:
        if finding.split == "train" and finding.is_labelled and finding.classes:
            cases.setdefault(finding.case_name, set()).update(finding.classes)
    counts = [
        f"{name} {sum(k in there for there in cases.values())}" for k, name in enumerate(data_set.class_names, start=1)
    ]
    problems = [
        Problem(name, "class", f"no labelled training case has the class {name}: label one, or leave the class out")
        for name in (missing_classes(cases.values(), data_set) if cases else ())
    ]
    sliced = {finding.case_name for finding in findings if SLICE in finding.name}
    problems += [
        Problem(
            name, "empty", f"{name} has an empty label in every slice: correct it, or take the case out of the list"
        )
        for name, there in cases.items()
        if there == {0} and name in sliced and data_set.files != "own"
    ]
    return f"{', '.join(counts)} of {len(cases)} labelled training cases", problems


def not_in_hu(findings: Sequence[Finding]) -> list[Problem]:
    """Name the cases of a CT data set whose images were no HU; of slices, all of a case that show something count."""
    cases: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.shape and not finding.is_constant:
            cases.setdefault(finding.case_name, []).append(finding)
    problems = []
    for name, mine in cases.items():
        if all(finding.hu_fault and not finding.is_hu_trusted for finding in mine):
            text = (
                f"{name} was not in HU when it was imported ({mine[0].hu_fault}): import the CT itself, or, if it was "
                "in HU after all, import it with --trust_hu --overwrite"
            )
            problems.append(Problem(name, "no HU", text))
    return problems


def remarks(findings: Sequence[Finding], known: Counter[Duplicate], root: Path, data_set: DataSet) -> list[str]:
    """Say what is unusual but not wrong."""
    lines = []
    for duplicate, count in known.items():
        files = f", {count} files each" if count else ""
        lines.append(f"known: {' and '.join(duplicate.patients)}{files}: {duplicate.remark}")
    blank = [f.name for f in findings if f.is_constant]
    if blank:
        lines.append(
            f"{len(blank)} slices hold one value (a margin, or nothing left by a mask) and train so: {few(blank)}"
        )
    healthy = sorted(
        {f.case_name for f in findings if f.classes == {0}} - {f.case_name for f in findings if f.classes - {0}}
    )
    if healthy and data_set.files == "own":
        lines.append(f"{len(healthy)} labelled cases have no foreground (healthy) and count as such: {few(healthy)}")
    trusted = sorted({f.case_name for f in findings if f.is_hu_trusted and not f.is_constant})
    if trusted:
        lines.append(f"{len(trusted)} cases do not look like HU and were imported with --trust_hu: {few(trusted)}")
    volumes = [f for f in findings if len(f.shape) == 3]
    if data_set.files == "own":
        files = {f.name: f.path for f in volumes}
        lines += filter(None, [unlike_cases(files, data_set.preprocessing.layout == "volume")])
    thin = [f.name for f in volumes if 1 in f.shape]
    if thin:
        lines.append(f"{len(thin)} of {len(volumes)} volumes are a single slice: {few(thin)}")
    if (root / DESCRIPTION).exists() and data_set.preprocessing.layout == "slices":
        axis = data_set.preprocessing.slice_axis
        lines.append(
            f"slices lie across {axis}" if axis else
            "the data set was imported before slices had one axis: import it again, with --overwrite"
        )  # fmt: skip
    return lines


def same_preprocessing(findings: Sequence[Finding], data_set: DataSet) -> list[Problem]:
    """Find files that were made in several ways: training refuses its own, and a test would score strangers."""
    paths = [f.path for f in findings if f.shape]
    try:
        if paths:
            data_set.preprocessing_of(texts_of(paths))
    except UserError as error:
        return [Problem("files", "preprocessing", str(error))]
    return []


def told(problems: Sequence[Problem]) -> list[str]:
    """Return a line a kind of problem: the first of it, how many there are, and the names of a few others."""
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem)
    lines = []
    for same in kinds.values():
        others = few(problem.name for problem in same[1:])
        lines.append(f"WRONG: {same[0].text}" if not others else
                     f"WRONG, {len(same)} times: {same[0].text} The others: {others}")  # fmt: skip
    return lines


def kind_of(finding: Finding) -> str:
    """Return what a file's problem has in common with others': the split and the sentence, without path and numbers."""
    return f"{finding.split}: " + re.sub(r"\d[\d.]*", "#", finding.problem.replace(str(finding.path), ""))
