"""Scoring predictors on cases in one pass, and the tables that come of it."""

import math
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import ndimage
from torch import nn

from sdcl.checkpoints import load_weights
from sdcl.inference import Slabs, mean_of
from sdcl.metrics import case_metrics
from sdcl.pseudo_labels import largest_components
from sdcl.runs.devices import give_back_freed_memory

STUDENTS = ("student_a", "student_b")
# What two students are scored by, to the roles whose probabilities are averaged: of stage 1, SDCL and CPS.
PREDICTORS = {"student_a": ("student_a",), "student_b": ("student_b",), "mean": STUDENTS}
LARGE_BYTES = 2**29  # of some planes' probabilities, beside which what a training step frees is little
PLANES = 8  # that labels are decided of at a time
Rule = Literal["argmax", "threshold"]
OnCase = Callable[["Case", dict[str, np.ndarray], dict[str, np.ndarray]], None]
Infer = Callable[[Sequence[nn.Module], np.ndarray], Slabs]


@dataclass(frozen=True)
class Case:
    """One volume to score.

    Attributes:
        name: as in the list.
        image: (*S) float32, or (channels, *S) of several.
        label: (*S) uint8, the reference.
        spacing: voxel sides in mm, where known.
        affine: (4, 4), from indices to mm (RAS+), where known.
    """

    name: str
    image: np.ndarray
    label: np.ndarray
    spacing: tuple[float, ...] | None = None
    affine: np.ndarray | None = None

    @property
    def shown(self) -> np.ndarray:
        """Return what figures show, (*S): the image, or its first channel."""
        return self.image if self.image.ndim == self.label.ndim else self.image[0]


@dataclass(frozen=True)
class Decision:
    """How probabilities (C, *S) become a label map.

    Attributes:
        rule: "argmax", or "threshold": class 1 where its probability is above 0.5, of two classes.
        largest_component: neighbours (4 or 8; 6, 18 or 26) by which only each class's largest component is kept;
            None keeps all.
    """

    rule: Rule = "argmax"
    largest_component: int | None = None

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        """Return the label map (*S), uint8, or uint16 for more than 256 classes."""
        return self.cleaned(self.labels(probabilities))

    def labels(self, probabilities: np.ndarray) -> np.ndarray:
        """Return the label map (*S) of some planes, voxel by voxel; cleaned() ends the whole one."""
        dtype = np.uint8 if len(probabilities) <= 256 else np.uint16
        if self.rule == "threshold":
            return (probabilities[1] > 0.5).astype(dtype)
        # Class by class, the first of equal ones wins as in argmax, which looks at a voxel's classes one by one.
        labels, best = np.zeros(probabilities.shape[1:], dtype), probabilities[0].copy()
        for c, probability in enumerate(probabilities[1:], start=1):
            np.copyto(labels, c, where=probability > best)
            np.maximum(best, probability, out=best)
        return labels

    def cleaned(self, labels: np.ndarray) -> np.ndarray:
        """Return a whole label map (*S) with what is kept of its components."""
        return labels if self.largest_component is None else largest_components(labels, self.largest_component)


@dataclass(frozen=True)
class Task:
    """What a data set fixes.

    Attributes:
        name: of the data set, in the run folder's name.
        class_names: of the foreground classes 1 to C - 1.
        infer: maps networks and a volume (*S), or (channels, *S), to slabs of each network's probabilities.
        decision: how probabilities become a label map.
        planes: axes across which slices are shown, the most familiar one first.
        label_values: the classes 1 to C - 1 in the original label files and in what is written; empty: the same.
        patient_of: maps a volume's name to its patient's, the unit of intervals and tests.
        channels: names of the images' channels; empty: one, which needs no name.
    """

    name: str
    class_names: Sequence[str]
    infer: Infer
    decision: Decision = Decision()
    planes: tuple[int, ...] = (0,)
    label_values: tuple[int, ...] = ()
    patient_of: Callable[[str], str] = str
    channels: tuple[str, ...] = ()

    @property
    def in_channels(self) -> int:
        """Count the images' channels."""
        return max(len(self.channels), 1)

    def original(self, label_map: np.ndarray) -> np.ndarray:
        """Return a label map (*S) with the original files' values instead of classes: uint8, or uint16 where needed."""
        values = (0, *(self.label_values or range(1, self.num_classes)))
        return np.array(values, np.uint8 if max(values) < 256 else np.uint16)[label_map]

    @property
    def num_classes(self) -> int:
        """Count the classes, background included."""
        return len(self.class_names) + 1

    @property
    def sizes(self) -> tuple[int, int]:
        """Return what networks are built for: the number of classes, and of the images' channels."""
        return self.num_classes, self.in_channels


@dataclass(frozen=True)
class CaseRow:
    """The metrics of one class of one case under one predictor; distances in voxels, and in mm or nan.

    The volumes of prediction and reference are in voxels, and in ml or nan.
    """

    predictor: str
    case: str
    structure: str
    dice: float
    jaccard: float
    hd95: float
    asd: float
    hd95_mm: float
    asd_mm: float
    empty: bool
    voxels: int
    reference_voxels: int
    ml: float
    reference_ml: float


@dataclass(frozen=True)
class Validation:
    """One validation: the mean Dice of each predictor, in [0, 1], and a picture (3, H, W) in [0, 1], or None."""

    dice: dict[str, float]
    panel: np.ndarray | None


@dataclass(frozen=True)
class Predictors:
    """Networks and what is made of them.

    Attributes:
        networks: each needed network once.
        members: name of a predictor to indices into networks; several: the mean of their probabilities.
        shown: how many of the first ones pictures show; the last of them is the answer that files hold.
        kept: those whose probabilities of whole volumes are kept, for files; each takes C times a volume's memory.
    """

    networks: list[nn.Module]
    members: dict[str, tuple[int, ...]]
    shown: int = 3
    kept: tuple[str, ...] = ()

    @classmethod
    def of(cls, networks: Mapping[str, nn.Module], roles_of: Mapping[str, tuple[str, ...]]) -> "Predictors":
        """Make them of networks by role, and of predictors' names to the roles whose probabilities are averaged."""
        roles = list(dict.fromkeys(role for members in roles_of.values() for role in members))
        members = {name: tuple(map(roles.index, of)) for name, of in roles_of.items()}
        return cls([networks[role] for role in roles], members, len(members))

    @property
    def pictured(self) -> list[str]:
        """The predictors that pictures show, the answer last."""
        return list(self.members)[: self.shown]

    def keeping_answer(self) -> "Predictors":
        """Return the same with the answer's probabilities kept."""
        return replace(self, kept=tuple(self.pictured[-1:]))

    @property
    def single(self) -> list[str]:
        """Those of them that are one network's."""
        return [name for name in self.pictured if len(self.members[name]) == 1]


def names_of(cases: Sequence[Case]) -> list[str]:
    """Return cases' names; of those that are read as they are asked for without reading any."""
    return list(cases.names) if hasattr(cases, "names") else [case.name for case in cases]


def load_predictors(
    folder: Path,
    make_network: Callable[[str], nn.Module],
    selected_on: str,
    roles_of: Mapping[str, tuple[str, ...]],
    last_first: bool = False,
    unselected: Collection[str] = (),
) -> Predictors:
    """Load a stage's best and last predictors; checkpoints of the same weights only once.

    A run that was never validated has no best ones. Where the best is the last, one predictor is named as both.

    Args:
        folder: a run's pre_train/ or self_train/.
        make_network: builds the network of a role, such as "student_a", on its device.
        selected_on: what the best was selected on, for its name.
        roles_of: the method's predictors, to the roles whose probabilities are averaged.
        last_first: the last ones are the run's answer, which pictures and files show, and not the best.
        unselected: those of which there may be no best one.

    Raises:
        UserError: a checkpoint is missing or does not fit.
    """
    known: dict[tuple[str, int | None], int] = {}
    networks: list[nn.Module] = []
    members: dict[str, tuple[int, ...]] = {}
    was_validated = any((folder / f"best_{name}.pth").exists() for name in roles_of)
    first: dict[str, tuple[str, tuple[int, ...]]] = {}
    kinds = [f"best on {selected_on}"] * was_validated + ["last"]
    for kind in kinds[::-1] if last_first else kinds:
        for name, roles in roles_of.items():
            path = folder / f"best_{name}.pth"
            only_last = name in unselected and not path.exists()
            if only_last and name in first:
                continue
            path = folder / "last.pth" if kind == "last" or only_last else path
            chosen = []
            for role in roles:
                network = make_network(role)
                iteration = load_weights(network, path, role).iteration
                if (role, iteration) not in known:
                    known[role, iteration] = len(networks)
                    networks.append(network)
                chosen.append(known[role, iteration])
            title = f"{name}, {'last' if only_last else kind} ({iteration})"
            if not only_last and first.get(name, ("", ()))[1] == tuple(chosen):  # one row says both
                title = f"{name}, best on {selected_on} and last ({iteration})"
                members = {title if key == first[name][0] else key: value for key, value in members.items()}
            first.setdefault(name, (title, tuple(chosen)))
            members[title] = tuple(chosen)
    return Predictors(networks, members, len(roles_of))


def evaluate(
    predictors: Predictors,
    cases: Iterable[Case],
    task: Task,
    *,
    distances: bool = True,
    on_case: OnCase | None = None,
    on_scored: Callable[[Case, list[CaseRow]], None] | None = None,
) -> list[CaseRow]:
    """Score every predictor on every case; each network sees each case once.

    Args:
        predictors: networks, and the predictors made of them.
        cases: what to score.
        task: how to predict, how to decide, and the structures' names.
        distances: also compute 95HD and ASD.
        on_case: called with each case, its label maps (*S) by predictor, and the probabilities (C, *S) of those kept.
        on_scored: called with each case and its rows, once they are there, in the cases' order.

    Returns:
        A row for each predictor, case and class.
    """
    rows: list[CaseRow] = []

    def collect(case: Case, futures: Sequence[Future[CaseRow]]) -> None:
        mine = [future.result() for future in futures]
        rows.extend(mine)
        if on_scored is not None:
            on_scored(case, mine)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="metrics") as pool:
        waiting: deque[tuple[Case, list[Future[CaseRow]]]] = deque()
        try:
            for case in cases:
                label_maps, probabilities = _predict(predictors, case, task)
                # Scored by other threads while the networks go on with the next case.
                futures, theirs = [], ndimage.find_objects(case.label, task.num_classes - 1)
                for name, label_map in label_maps.items():
                    ours = ndimage.find_objects(label_map, task.num_classes - 1)
                    for c, structure in enumerate(task.class_names, start=1):
                        box = _joined(ours[c - 1], theirs[c - 1])
                        both = label_map[box], case.label[box]
                        futures.append(pool.submit(_score, name, case, (c, structure), both, distances))
                waiting.append((case, futures))
                if on_case is not None:
                    on_case(case, label_maps, probabilities)
                del label_maps, probabilities
                # Where scoring is slower than predicting, no more than two cases' label maps are in memory.
                while waiting and (len(waiting) > 1 or all(future.done() for future in waiting[0][1])):
                    collect(*waiting.popleft())
            while waiting:
                collect(*waiting.popleft())
            return rows
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error nobody waits for the rest


def _predict(predictors: Predictors, case: Case, task: Task) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return each predictor's label map (*S), and the probabilities (C, *S) of those to keep, of one case."""
    label_maps: dict[str, np.ndarray] = {}
    probabilities: dict[str, np.ndarray] = {}
    largest = 0
    for slab, outputs in task.infer(predictors.networks, case.image):
        for where, some in _pieces(slab, outputs):  # beside which what is made of them is small
            for name, members in predictors.members.items():
                found = mean_of([some[i] for i in members])
                labels = task.decision.labels(found)
                if name not in label_maps:
                    label_maps[name] = np.zeros(case.label.shape, labels.dtype)
                label_maps[name][where] = labels
                if name in predictors.kept:
                    if name not in probabilities:
                        probabilities[name] = np.empty((len(found), *case.label.shape), np.float32)
                    probabilities[name][:, where] = found
        largest = max(largest, sum(output.nbytes for output in outputs))
        del outputs, some, found  # as large as a window's planes: not kept while the next windows are computed
    if largest > LARGE_BYTES:
        give_back_freed_memory()  # scoring would need other blocks beside these
    return {name: task.decision.cleaned(labels) for name, labels in label_maps.items()}, probabilities


def _pieces(slab: slice, outputs: Sequence[np.ndarray]) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """Yield a slab's probabilities (C, planes, ...) of each network some planes at a time, with their place."""
    for first in range(slab.start, slab.stop, PLANES):
        last = min(first + PLANES, slab.stop)
        yield slice(first, last), [x[:, first - slab.start : last - slab.start] for x in outputs]


def _joined(*boxes: tuple[slice, ...] | None) -> tuple[slice, ...]:
    """Return the smallest box that holds some boxes, as scipy.ndimage.find_objects() has them; an empty one of None.

    A class that is scored there has the same overlaps and distances, and masks as small as it is, whatever the volume.
    """
    found = [box for box in boxes if box is not None]
    sides = zip(*found, strict=True)
    return tuple(slice(min(s.start for s in same), max(s.stop for s in same)) for same in sides) or (slice(0),)


def _score(
    predictor: str, case: Case, numbered: tuple[int, str], both: tuple[np.ndarray, np.ndarray], distances: bool
) -> CaseRow:
    """Score a class, given as number and name, in both label maps; only the threads at work hold its masks."""
    number, structure = numbered
    prediction, reference = (labels == number for labels in both)
    voxels = case_metrics(prediction, reference, distances=distances)
    mm = case_metrics(prediction, reference, case.spacing) if case.spacing and distances else None
    hd95_mm, asd_mm = (mm.hd95, mm.asd) if mm else (math.nan, math.nan)
    volumes = int(np.count_nonzero(prediction)), int(np.count_nonzero(reference))
    ml = math.prod(case.spacing) / 1000 if case.spacing else math.nan
    return CaseRow(
        predictor, case.name, structure, voxels.dice, voxels.jaccard, voxels.hd95, voxels.asd, hd95_mm, asd_mm,
        voxels.empty, *volumes, *(volume * ml for volume in volumes),
    )  # fmt: skip
