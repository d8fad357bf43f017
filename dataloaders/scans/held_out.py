"""Labelled scans for a locator: read, shown coarsely, divided into folds, and how well those held out are found."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from scipy import ndimage
from torch import nn
from tqdm import tqdm

from dataloaders.files import read_list
from dataloaders.scans.alignment import check_alignment
from dataloaders.scans.convert import check_trust, few
from dataloaders.scans.joining import Cases
from dataloaders.scans.locating import SIDES, Facts, Located, Locator, coarsely, measured, window_of
from dataloaders.scans.preprocessing import WINDOW_HU, Box, Prepared, Preprocessing, label_box, prepare_label
from dataloaders.scans.reading import Scan, aligned_label, label_by_index, read_label, read_scan, says_nothing
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

LEAST_CASES = 2


@dataclass(frozen=True)
class LabelledScan:
    """A labelled scan, seen coarsely.

    Attributes:
        name: of the case.
        patient: cases of one patient are held out together.
        seen: the image on the coarse grid.
        mask: uint8, the coarse voxels that hold some of the structure.
        box: of the structure, in the scan's own voxels.
        scan: the scan's grid; its voxels are no longer in memory.
        channel: that is looked at, of images of several; "" of one.
    """

    name: str
    patient: str
    seen: Prepared
    mask: np.ndarray
    box: Box
    scan: Scan
    channel: str = ""


def choose(config: Any, found: Cases) -> dict[str, tuple[tuple[Path, ...], Path]]:
    """Return the labelled cases to learn from: those of --cases, and of a table's training and validation.

    Raises:
        UserError: --cases names one that is not there or has no label, or there are too few.
    """
    labelled = {name: files for name, files in found.files.items() if files[1] is not None}
    left = {"without a label": [name for name in found.files if name not in labelled]}
    left["of the table's test"] = [name for name in labelled if found.splits.get(name) == "test"]
    if config.cases is not None:
        names = read_list(config.cases)
        unknown = next((name for name in names if name not in labelled), None)
        if unknown is not None:
            known = few(sorted(labelled))
            raise UserError(f"--cases {config.cases} names {unknown}, which is no labelled case: there are {known}.")
        left["not in --cases"] = [name for name in labelled if name not in names]
    gone = set().union(*left.values())
    for reason, names in left.items():
        if names:
            LOGGER.info("%d scans %s, left out: %s", len(names), reason, few(names))
    chosen = {name: files for name, files in labelled.items() if name not in gone}
    if len(chosen) < max(LEAST_CASES, config.folds):
        wanted = f"--folds {config.folds} needs as many" if config.folds > LEAST_CASES else f"{LEAST_CASES} are needed"
        raise UserError(f"there are {len(chosen)} labelled cases to learn from, and {wanted}: label more of them.")
    check_trust(config.trust, chosen)
    return chosen


def read_cases(config: Any, found: Cases) -> list[LabelledScan]:
    """Read the labelled cases and show them coarsely.

    Args:
        config: code/locate_train.py's header.
        found: the cases, from find_cases().

    Raises:
        UserError: a case is refused, or there are too few.
    """
    chosen, how = choose(config, found), preprocessing_of(config)
    if found.channels:
        LOGGER.info("of the channels %s the locator looks at %s", ", ".join(found.channels), found.channels[0])

    def read(name: str) -> LabelledScan | None:
        (image_path, *_), label_path = chosen[name]
        one = read_case((name, found.patients.get(name, name)), image_path, label_path, how, config)
        return replace(one, channel=found.channels[0]) if one is not None and found.channels else one

    with ThreadPoolExecutor(config.workers) as pool:
        try:
            futures = [pool.submit(read, name) for name in chosen]
            done = tqdm(futures, unit="case", desc="reading", dynamic_ncols=True, disable=None)
            read_of = dict(zip(chosen, [future.result() for future in done], strict=True))
        finally:
            pool.shutdown(cancel_futures=True)
    if healthy := [name for name, one in read_of.items() if one is None]:
        LOGGER.info("left out, since their labels have no foreground: %s", ", ".join(healthy))
    cases = [one for one in read_of.values() if one is not None]
    if len(cases) < LEAST_CASES:
        raise UserError(f"{len(cases)} labels have foreground, and {LEAST_CASES} are needed: label more cases.")
    return cases


def preprocessing_of(config: Any) -> Preprocessing:
    """Return what is done to every scan."""
    return Preprocessing(config.normalise, "LPS", (config.spacing_mm,) * 3)


def read_case(
    names: tuple[str, str], image_path: Path, label_path: Path, how: Preprocessing, config: Any
) -> LabelledScan | None:
    """Read one case, of a name and a patient, or return None if its label has no foreground; see read_cases()."""
    image = read_scan(image_path, pixel_spacing_mm=config.pixel_spacing_mm)
    label = read_label(label_path, onto=image, may_be_empty=True)
    if not label.array.any():
        return None
    structure = np.isin(label.array, config.label_values) if config.label_values else label.array > 0
    if not structure.any():
        values = " ".join(map(str, config.label_values))
        raise UserError(f"{label_path} has none of --label_values {values}: correct them, or leave the case out.")
    lay = label_by_index if config.by_index and says_nothing(label) else aligned_label
    on_image = lay(image, Scan(label_path, structure.astype(np.uint8), label.affine))
    seen = coarsely(image, how, config.trust_hu)  # first: what is no CT aligns nowhere
    if how.normalise == "ct" and not {names[0], "all"} & set(config.trust):
        clipped, way_out = np.clip(image.array, *WINDOW_HU), f"give --trust {names[0]}"
        check_alignment(label_path, clipped, on_image, is_organ_ct=False, way_out=way_out)
    covered = ndimage.maximum_filter(on_image, window_of(image, how))  # thin parts reach as far as the others
    mask = prepare_label(covered, image, how)
    grid = Scan(image_path, np.broadcast_to(np.float32(0), image.array.shape), image.affine)
    return LabelledScan(*names, seen, mask, label_box(on_image), grid)


def facts_of(cases: Sequence[LabelledScan], config: Any, margin_mm: float) -> Facts:
    """Return what a locator trained on some cases knows beside its weights."""
    found = [measured(case.mask, nibabel.affines.voxel_sizes(case.seen.affine)) for case in cases]
    volumes, sides = [volume for volume, _ in found], list(zip(*[sides for _, sides in found], strict=True))
    edges = [
        [(first == 0, end == side) for (first, end), side in zip(label_box(case.mask), case.mask.shape, strict=True)]
        for case in cases
    ]
    at_edge = tuple((any(e[axis][0] for e in edges), any(e[axis][1] for e in edges)) for axis in range(3))
    return Facts(
        preprocessing_of(config), margin_mm, tuple(config.least_mm), (min(volumes), max(volumes)),
        tuple((min(lengths), max(lengths)) for lengths in sides), at_edge, tuple(case.name for case in cases),
        cases[0].channel,
    )  # fmt: skip


def folds_of(cases: Sequence[LabelledScan], count: int, seed: int) -> list[list[LabelledScan]]:
    """Divide cases into folds of about the same number of patients, whose cases stay together.

    Raises:
        UserError: there are fewer patients than folds.
    """
    patients = sorted({case.patient for case in cases})
    if len(patients) < count:
        raise UserError(f"--folds is {count}, but the cases are of {len(patients)} patients: lower it, or 0 for none.")
    order = [patients[k] for k in np.random.default_rng(seed).permutation(len(patients))]
    return [[case for case in cases if case.patient in order[k::count]] for k in range(count)]


@dataclass(frozen=True)
class Judged:
    """How a case that was held out was found.

    Attributes:
        name: of the case.
        margins_mm: from the structure to each side of the box, negative where it sticks out; None where the box ends
            with the scan, beyond which nothing can stick out.
        box_share: the box's volume over that of the structure's own box.
        doubts: what the locator is unsure of.
        refused: why nothing was found, else "".
    """

    name: str
    margins_mm: dict[str, float | None]
    box_share: float | None = None
    doubts: tuple[str, ...] = ()
    refused: str = ""

    @property
    def least_mm(self) -> float | None:
        """Return the smallest margin; None where nothing was found, or the box is the whole scan."""
        return min((margin for margin in self.margins_mm.values() if margin is not None), default=None)

    @property
    def holds(self) -> bool:
        """Tell whether the box holds the whole structure."""
        return not self.refused and (self.least_mm is None or self.least_mm >= 0)

    def row(self) -> dict[str, Any]:
        """Return it as a row of held_out.csv."""
        sides = {f"{side}_mm": self.margins_mm.get(side) for pair in SIDES for side in pair}
        told = self.refused or "; ".join(self.doubts)
        kept = {"case": self.name, "holds": int(self.holds), "least_mm": self.least_mm}
        return kept | sides | {"box_share": self.box_share, "unsure": told}


def judge(case: LabelledScan, locator: Locator) -> Judged:
    """Locate a case that was held out and compare the box with its label."""
    try:
        found = locator.locate_coarse(case.seen, case.scan)
    except UserError as error:
        return Judged(case.name, {}, refused=str(error))
    return Judged(case.name, margins_mm(found, case), _volume(found.box) / _volume(case.box), found.doubts)


def margins_mm(found: Located, case: LabelledScan) -> dict[str, float | None]:
    """Return the distances from a structure to the sides of a box; see Judged."""
    margins: dict[str, float | None] = {}
    axes = nibabel.io_orientation(case.scan.affine)
    turned = nibabel.orientations.ornt_transform(axes, nibabel.orientations.axcodes2ornt("LPS"))
    for k, ((low, high), (first, end)) in enumerate(zip(found.box, case.box, strict=True)):
        names = SIDES[int(turned[k, 0])][:: int(turned[k, 1])]
        mm = case.scan.spacing_mm[k]
        margins[names[0]] = None if low == 0 else (first - low) * mm
        margins[names[1]] = None if high == case.scan.array.shape[k] else (high - end) * mm
    return margins


def _volume(box: Box) -> float:
    return float(np.prod([end - first for first, end in box]))


Fit = Callable[[Sequence[LabelledScan], str], nn.Module]


def leave_some_out(cases: Sequence[LabelledScan], config: Any, fit: Fit) -> list[Judged]:
    """Hold each fold out once, train on the others, and judge the boxes of those held out.

    Args:
        cases: all labelled cases.
        config: code/locate_train.py's header.
        fit: trains a network on some cases, with a title for its progress.
    """
    judged = []
    for k, fold in enumerate(folds := folds_of(cases, config.folds, config.seed), start=1):
        rest = [case for case in cases if case not in fold]
        locator = Locator(facts_of(rest, config, config.margin_mm), fit(rest, f"fold {k} of {len(folds)}"))
        for case in fold:
            judged.append(judge(case, locator))
            _tell(judged[-1])
    return judged


def _tell(one: Judged) -> None:
    if one.refused:
        LOGGER.info("held out %s: NOT FOUND: %s", one.name, one.refused)
        return
    least = "the box is the whole scan" if one.least_mm is None else f"smallest margin {one.least_mm:.1f} mm"
    unsure = f"; unsure: {'; '.join(one.doubts)}" if one.doubts else ""
    LOGGER.info("held out %s: %s, %s, %.1f times the structure's own box%s", one.name,
                "held" if one.holds else "NOT HELD", least, one.box_share, unsure)  # fmt: skip


def margin_of(judged: Sequence[Judged], margin_mm: float) -> float:
    """Return the margin that would have held every structure that was found, in whole mm above the given one.

    Args:
        judged: cases held out, with a margin of margin_mm.
        margin_mm: that one.
    """
    least = min((one.least_mm for one in judged if one.least_mm is not None), default=0.0)
    return margin_mm + max(0.0, float(np.ceil(-least)))


def summary(judged: Sequence[Judged], margin_mm: float) -> dict[str, Any]:
    """Return what the cases held out say of a locator, in numbers, and log it."""
    least = [one for one in judged if one.least_mm is not None]
    held, unsure = [one for one in judged if one.holds], [one.name for one in judged if one.doubts or one.refused]
    whole = [one.name for one in held if one.least_mm is None]
    worst = min(least, key=lambda one: one.least_mm, default=None)
    content = {
        "cases": len(judged), "held": len(held), "margin_mm": margin_mm,
        "least_margin_mm": worst and worst.least_mm, "least_margin_case": worst and worst.name,
        "median_margin_mm": float(np.median([one.least_mm for one in least])) if least else None,
        "median_box_share": float(np.median([one.box_share for one in held])) if held else None,
        "whole_scan": whole, "not_held": [one.name for one in judged if not one.holds], "unsure": unsure,
    }  # fmt: skip
    LOGGER.info("held out: with a margin of %g mm the box holds the structure in %d of %d cases",
                margin_mm, len(held), len(judged))  # fmt: skip
    if whole:
        LOGGER.info("NOTE: of %d of these the box is the whole scan, which says nothing: %s", len(whole), few(whole))
    if worst:
        LOGGER.info("the smallest margin left is %.1f mm (%s), the median case's %.1f mm; the boxes are %.1f times the "
                    "structures' own (median); unsure of %d cases%s", worst.least_mm, worst.name,
                    content["median_margin_mm"], content["median_box_share"] or np.nan, len(unsure),
                    f": {few(unsure)}" if unsure else "")  # fmt: skip
    return content
