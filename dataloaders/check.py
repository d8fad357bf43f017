"""The doctor of a data set: `python dataloaders/check.py --dataset la`; what is wrong, before any training."""

import hashlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))  # this checkout's code, whichever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sdcl.runs.config import run_script  # first: from here on Ctrl-C ends without a traceback

# isort: split
import numpy as np
from tqdm import tqdm

from dataloaders import acdc, la, pancreas
from dataloaders.datasets import SLICE, DataSet
from dataloaders.files import read_list, read_sample, read_spacing, read_text_attributes
from dataloaders.findings import (
    Finding,
    Problem,
    doubles,
    kind_of,
    labels_of,
    not_in_hu,
    remarks,
    same_preprocessing,
    told,
)
from dataloaders.own import read_data_set
from dataloaders.scans.hounsfield import TRUSTED_HU, prepared_fault
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER, start_logging
from sdcl.runs.written_files import check_replaceable

if TYPE_CHECKING:
    from sdcl.scoring.evaluation import Case

ROOT = Path(__file__).resolve().parents[1]
KNOWN = {"la": la.DATA_SET, "acdc": acdc.DATA_SET, "pancreas": pancreas.DATA_SET}


@dataclass
class Config:
    """Check a data set's lists and files; print one table, draw a few cases, exit with 1 if anything is wrong."""

    dataset: Literal["la", "acdc", "pancreas", "own"]  # which; own: made by import_nifti.py
    root_path: Path | None = None  # its folder, with data/ and data_split/; None: Datasets/<dataset>
    figure: Path | None = None  # PNG of a few labelled cases with contours; None: check_<dataset>.png, here
    workers: int = 4  # files read at a time


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
        sample = read_sample(
            path, ndim=ndim, num_classes=data_set.num_classes, needs_label=found.is_labelled, channels=data_set.channels
        )
        found.shape, found.num_bytes = sample.shape, sample.num_bytes
        found.low, found.high = float(sample.image.min()), float(sample.image.max())
        found.content = hashlib.sha256(sample.image.tobytes()).hexdigest()
        found.spacing = read_spacing(path) if ndim == 3 else None
        rules = data_set.preprocessing.rules
        if "ct" in rules:
            found.hu_fault = prepared_fault(sample.image[rules.index("ct")] if len(rules) > 1 else sample.image)
            found.is_hu_trusted = bool(found.hu_fault) and read_text_attributes(path, "hu") == (TRUSTED_HU,)
        if sample.label is not None:
            found.classes = frozenset(np.unique(sample.label).tolist())
            if found.classes == {0} and ndim == 3 and data_set.files != "own":  # published sets have none
                found.problem = f"{path} has an empty label: correct it, or take the case out of the list"
            data_set.check_label(path, sample)
        if keep and sample.label is not None and ndim == 3:
            from sdcl.scoring.evaluation import Case  # with PyTorch, for which a wrong flag need not wait

            found.case = drawable(Case(name, sample.image, sample.label, found.spacing))
    except UserError as error:
        found.problem = str(error)
    return found


def drawable(case: "Case") -> "Case":
    """Return a case of at least two voxels along each axis, single ones doubled: a contour needs them."""
    thin = [axis for axis, side in enumerate(case.label.shape) if side == 1]
    image, label = case.shown, case.label
    for axis in thin:
        image, label = np.repeat(image, 2, axis), np.repeat(label, 2, axis)
    return replace(case, image=image, label=label)


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
    figure = config.figure or Path(f"check_{config.dataset}.png")
    check_replaceable(figure)
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
    problems += shared + untaught + same_preprocessing(findings, data_set) + not_in_hu(findings)
    LOGGER.info("%s in %s\n\n%s\n", data_set.name, root.resolve(), table(findings, data_set))
    LOGGER.info("classes: %s", classes)
    usual = max((f.spacing for f in findings if f.spacing), default=None)
    LOGGER.info("spacing: %s", "not known; distances come in voxels" if usual is None else "known, distances in mm too")
    cases = [finding.case for finding in findings if finding.case is not None]
    if cases:
        from sdcl.scoring.figures import save_label_figure

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
