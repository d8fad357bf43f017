"""The doctor of a data set: `python dataloaders/check.py --dataset la`; what is wrong, before any training."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from dataloaders import acdc, la, pancreas
from dataloaders.convert import few
from dataloaders.datasets import SLICE, DataSet, Duplicate, missing_classes
from dataloaders.files import read_list, read_sample, read_spacing
from dataloaders.own import DESCRIPTION, read_data_set
from sdcl.config import run_script
from sdcl.errors import UserError
from sdcl.evaluation import Case
from sdcl.report import save_label_figure
from sdcl.runs import LOGGER, start_logging

ROOT = Path(__file__).resolve().parents[1]
KNOWN = {"la": la.DATA_SET, "acdc": acdc.DATA_SET, "pancreas": pancreas.DATA_SET}


@dataclass
class Config:
    """Check a data set's lists and files; print one table, draw a few cases, exit with 1 if anything is wrong."""

    dataset: Literal["la", "acdc", "pancreas", "own"]  # which; own: made by import_nifti.py
    root_path: Path | None = None  # its folder, with data/ and data_split/; None: Datasets/<dataset>
    figure: Path | None = None  # PNG of a few labelled cases with contours; None: check_<dataset>.png, here
    workers: int = 4  # files read at a time


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
    case: Case | None = field(default=None, repr=False)

    @property
    def is_constant(self) -> bool:
        """Tell whether the image is one value."""
        return bool(self.shape) and self.low == self.high

    @property
    def case_name(self) -> str:
        """Return the case's name, of a slice without its number."""
        return self.name.rsplit(SLICE, 1)[0]


def lists_of(root: Path, data_set: DataSet) -> dict[str, list[str]]:
    """Read the lists that training and testing read.

    Returns:
        "train" (in 2D the slices'), "val" and "test" where they are, to names.
    """
    is_3d = data_set.preprocessing.layout == "volume"
    suffix = ".txt" if is_3d else ".list"
    files = {"train": "train" if is_3d else "train_slices", "val": "val", "test": "test"}
    paths = {split: root / "data_split" / f"{name}{suffix}" for split, name in files.items()}
    needed = {split: path for split, path in paths.items() if split != "val" or path.exists()}
    return {split: read_list(path) for split, path in needed.items()}


def examine(name: str, split: str, root: Path, data_set: DataSet, labelled: set[str], keep: bool) -> Finding:
    """Read one file and say what it is, or what is wrong with it."""
    path = data_set.path_of(root, name)
    found = Finding(name, split, path, is_labelled=split != "train" or name in labelled)
    try:
        ndim = 2 if SLICE in name else 3
        sample = read_sample(path, ndim=ndim, num_classes=data_set.num_classes, needs_label=found.is_labelled)
        found.shape, found.num_bytes = sample.image.shape, sample.num_bytes
        found.low, found.high = float(sample.image.min()), float(sample.image.max())
        found.content = hashlib.sha256(sample.image.tobytes()).hexdigest()
        found.spacing = read_spacing(path) if ndim == 3 else None
        if sample.label is not None:
            found.classes = frozenset(np.unique(sample.label).tolist())
            if found.classes == {0} and ndim == 3:
                found.problem = f"{path} has an empty label: correct it, or take the case out of the list"
            data_set.check_label(path, sample)
        if keep and sample.label is not None and ndim == 3:
            found.case = drawable(Case(name, sample.image, sample.label, found.spacing))
    except UserError as error:
        found.problem = str(error)
    return found


def drawable(case: Case) -> Case:
    """Return a case of at least two voxels along each axis, single ones doubled: a contour needs them."""
    thin = [axis for axis, side in enumerate(case.image.shape) if side == 1]
    image, label = case.image, case.label
    for axis in thin:
        image, label = np.repeat(image, 2, axis), np.repeat(label, 2, axis)
    return replace(case, image=image, label=label)


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
        if there == {0} and name in sliced
    ]
    return f"{', '.join(counts)} of {len(cases)} labelled training cases", problems


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
    volumes = [f for f in findings if len(f.shape) == 3]
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
            data_set.preprocessing_of(paths)
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


def table(findings: Sequence[Finding], data_set: DataSet) -> str:
    """Return a line a split: cases, shapes, ranges, classes, memory."""
    lines = [f"{'list':8}{'files':>7}{'labelled':>10}{'shapes':>34}{'range':>18}{'GiB':>8}  classes"]
    for split in dict.fromkeys(f.split for f in findings):
        mine = [f for f in findings if f.split == split and f.shape]
        shapes = np.array([f.shape for f in mine]) if mine else np.zeros((1, 1), int)
        sides = "×".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(shapes.min(0), shapes.max(0), strict=True))
        span = f"{min((f.low for f in mine), default=0):.3g} to {max((f.high for f in mine), default=0):.3g}"
        classes = sorted(frozenset().union(*(f.classes for f in mine)))
        named = ", ".join(f"{c} {data_set.class_names[c - 1]}" for c in classes if c)
        count, labelled = sum(f.split == split for f in findings), sum(f.is_labelled for f in mine)
        gib = sum(f.num_bytes for f in mine) / 2**30
        lines.append(f"{split:8}{count:7}{labelled:10}{sides:>34}{span:>18}{gib:8.2f}  {named}")
    return "\n".join(lines)


def labelled_names(root: Path, data_set: DataSet, train: Sequence[str]) -> set[str]:
    """Return the training names that have to have a label: those of train_lab, or all where there is no such list."""
    suffix = ".txt" if data_set.preprocessing.layout == "volume" else ".list"
    path = root / "data_split" / f"train_lab{suffix}"
    return set(read_list(path)) if path.exists() else set(train)


def main(config: Config) -> None:
    """Check everything, then say everything."""
    start_logging()
    root = config.root_path or ROOT / "Datasets" / config.dataset
    data_set = read_data_set(root) if config.dataset == "own" else KNOWN[config.dataset]
    data_set.check_root(root)
    lists = lists_of(root, data_set)
    labelled = labelled_names(root, data_set, lists["train"])
    problems = [
        Problem(name, "train_lab", f"train_lab names {name}, which train does not: correct the list.")
        for name in sorted(labelled - set(lists["train"]))
    ]
    jobs = [(name, split) for split, names in lists.items() for name in names]
    drawn = {name for names in lists.values() for name in names if SLICE not in name}
    drawn = set(sorted(drawn, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:4])
    with ThreadPoolExecutor(config.workers) as pool:
        found = pool.map(lambda job: examine(*job, root, data_set, labelled, job[0] in drawn), jobs)
        findings = list(tqdm(found, total=len(jobs), unit="file", desc="checking", leave=False, disable=None))
    problems += [Problem(f.name, kind_of(f), f.problem) for f in findings if f.problem]
    shared, known = doubles(findings, data_set)
    classes, untaught = labels_of(findings, data_set)
    problems += shared + untaught + same_preprocessing(findings, data_set)
    LOGGER.info("%s in %s\n\n%s\n", data_set.name, root.resolve(), table(findings, data_set))
    LOGGER.info("classes: %s", classes)
    usual = max((f.spacing for f in findings if f.spacing), default=None)
    LOGGER.info("spacing: %s", "not known; distances come in voxels" if usual is None else "known, distances in mm too")
    cases = [finding.case for finding in findings if finding.case is not None]
    if cases:
        figure = config.figure or Path(f"check_{config.dataset}.png")
        figure.parent.mkdir(parents=True, exist_ok=True)
        save_label_figure(figure, cases, data_set.class_names, data_set.preprocessing.layout == "volume")
        LOGGER.info("look at %s: the contours must follow what they are of", figure)
    for line in remarks(findings, known, root, data_set) + told(problems):
        LOGGER.info("%s", line)
    if problems:
        raise UserError(f"{len(problems)} things are wrong with {root}: mend what the lines above name.")
    LOGGER.info("nothing is wrong: %d files", len(findings))


if __name__ == "__main__":
    run_script(main, Config)
