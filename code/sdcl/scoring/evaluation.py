"""Scoring predictors on cases in one pass, and the tables that come of it."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from torch import nn

from sdcl.checkpoints import load_weights
from sdcl.metrics import case_metrics
from sdcl.pseudo_labels import largest_components

STUDENTS = ("student_a", "student_b")
PREDICTORS = {"student_a": (0,), "student_b": (1,), "mean": (0, 1)}  # members, as indices into STUDENTS
METRICS = {
    "dice": "Dice",
    "jaccard": "Jaccard",
    "hd95": "95HD [voxel]",
    "asd": "ASD [voxel]",
    "hd95_mm": "95HD [mm]",
    "asd_mm": "ASD [mm]",
}  # name to heading
MEAN = "mean"  # the row that averages the foreground classes of a case
Protocol = Literal["default", "paper"]
Rule = Literal["argmax", "threshold"]
OnCase = Callable[["Case", dict[str, np.ndarray], dict[str, np.ndarray]], None]
Infer = Callable[[Sequence[nn.Module], np.ndarray], list[np.ndarray]]


@dataclass(frozen=True)
class Case:
    """One volume to score.

    Attributes:
        name: as in the list.
        image: (*S) float32.
        label: (*S) uint8, the reference.
        spacing: voxel sides in mm, where known.
        affine: (4, 4), from indices to mm (RAS+), where known.
    """

    name: str
    image: np.ndarray
    label: np.ndarray
    spacing: tuple[float, ...] | None = None
    affine: np.ndarray | None = None


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
        labels = probabilities[1] > 0.5 if self.rule == "threshold" else probabilities.argmax(0)
        labels = labels.astype(np.uint8 if len(probabilities) <= 256 else np.uint16)
        return labels if self.largest_component is None else largest_components(labels, self.largest_component)


@dataclass(frozen=True)
class Task:
    """What a data set fixes.

    Attributes:
        name: of the data set, in the run folder's name.
        class_names: of the foreground classes 1 to C - 1.
        infer: maps networks and a volume (*S) to each network's probabilities (C, *S).
        decision: how probabilities become a label map.
        planes: axes across which slices are shown, the most familiar one first.
        label_values: the classes 1 to C - 1 in the original label files and in what is written; empty: the same.
    """

    name: str
    class_names: Sequence[str]
    infer: Infer
    decision: Decision = Decision()
    planes: tuple[int, ...] = (0,)
    label_values: tuple[int, ...] = ()

    def original(self, label_map: np.ndarray) -> np.ndarray:
        """Return a label map (*S) with the original files' values instead of classes: uint8, or uint16 where needed."""
        values = (0, *(self.label_values or range(1, self.num_classes)))
        return np.array(values, np.uint8 if max(values) < 256 else np.uint16)[label_map]

    @property
    def num_classes(self) -> int:
        """Count the classes, background included."""
        return len(self.class_names) + 1


@dataclass(frozen=True)
class CaseRow:
    """The metrics of one class of one case under one predictor; distances in voxels, and in mm or nan."""

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


@dataclass(frozen=True)
class SummaryRow:
    """Mean and standard deviation (of the population of cases) of each metric of one structure and predictor.

    Attributes:
        counts: cases that each mean is over; cases that are nan are left out.
        empty: cases whose prediction or reference of this structure is empty.
    """

    predictor: str
    structure: str
    means: dict[str, float]
    deviations: dict[str, float]
    counts: dict[str, int]
    empty: int


@dataclass(frozen=True)
class Validation:
    """One validation: the mean Dice of each predictor, in [0, 1], and a picture (3, H, W) in [0, 1]."""

    dice: dict[str, float]
    panel: np.ndarray


@dataclass(frozen=True)
class Predictors:
    """Networks and what is made of them.

    Attributes:
        networks: each needed network once.
        members: name of a predictor to indices into networks; several: the mean of their probabilities.
        shown: how many of the first ones pictures show; the last of them is the answer that files hold.
    """

    networks: list[nn.Module]
    members: dict[str, tuple[int, ...]]
    shown: int = 3

    @property
    def pictured(self) -> list[str]:
        """The predictors that pictures show, the answer last."""
        return list(self.members)[: self.shown]

    @property
    def single(self) -> list[str]:
        """Those of them that are one network's."""
        return [name for name in self.pictured if len(self.members[name]) == 1]


def load_predictors(
    folder: Path, make_network: Callable[[str], nn.Module], selected_on: str, roles_of: Mapping[str, tuple[str, ...]]
) -> Predictors:
    """Load a stage's best and last predictors; checkpoints of the same weights only once.

    A run that was never validated has no best ones. Where the best is the last, one predictor is named as both.

    Args:
        folder: a run's pre_train/ or self_train/.
        make_network: builds the network of a role, such as "student_a", on its device.
        selected_on: what the best was selected on, for its name.
        roles_of: the method's predictors, to the roles whose probabilities are averaged.

    Raises:
        UserError: a checkpoint is missing or does not fit.
    """
    known: dict[tuple[str, int | None], int] = {}
    networks: list[nn.Module] = []
    members: dict[str, tuple[int, ...]] = {}
    was_validated = any((folder / f"best_{name}.pth").exists() for name in roles_of)
    best: dict[str, tuple[str, tuple[int, ...]]] = {}
    for kind in [f"best on {selected_on}"] * was_validated + ["last"]:
        for name, roles in roles_of.items():
            path = folder / ("last.pth" if kind == "last" else f"best_{name}.pth")
            chosen = []
            for role in roles:
                network = make_network(role)
                iteration = load_weights(network, path, role).iteration
                if (role, iteration) not in known:
                    known[role, iteration] = len(networks)
                    networks.append(network)
                chosen.append(known[role, iteration])
            title = f"{name}, {kind} ({iteration})"
            if kind == "last" and best.get(name, ("", ()))[1] == tuple(chosen):  # one row says both
                title = f"{name}, best on {selected_on} and last ({iteration})"
                members = {title if key == best[name][0] else key: value for key, value in members.items()}
            best.setdefault(name, (title, tuple(chosen)))
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
        on_case: called with each case, its label maps (*S) and its probabilities (C, *S), both by predictor.
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
                futures = [
                    pool.submit(_score, name, case, structure, label_map == c, case.label == c, distances)
                    for name, label_map in label_maps.items()
                    for c, structure in enumerate(task.class_names, start=1)
                ]
                waiting.append((case, futures))
                if on_case is not None:
                    on_case(case, label_maps, probabilities)
                while waiting and all(future.done() for future in waiting[0][1]):
                    collect(*waiting.popleft())
            while waiting:
                collect(*waiting.popleft())
            return rows
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error nobody waits for the rest


def _predict(predictors: Predictors, case: Case, task: Task) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return each predictor's label map (*S) and probabilities (C, *S) of one case."""
    outputs = task.infer(predictors.networks, case.image)
    probabilities = {
        name: np.mean([outputs[i] for i in members], axis=0) if len(members) > 1 else outputs[members[0]]
        for name, members in predictors.members.items()
    }
    return {name: task.decision(p) for name, p in probabilities.items()}, probabilities


def _score(
    predictor: str, case: Case, structure: str, prediction: np.ndarray, reference: np.ndarray, distances: bool
) -> CaseRow:
    voxels = case_metrics(prediction, reference, distances=distances)
    mm = case_metrics(prediction, reference, case.spacing) if case.spacing and distances else None
    hd95_mm, asd_mm = (mm.hd95, mm.asd) if mm else (math.nan, math.nan)
    return CaseRow(
        predictor, case.name, structure, voxels.dice, voxels.jaccard, voxels.hd95, voxels.asd, hd95_mm, asd_mm,
        voxels.empty,
    )  # fmt: skip


def apply_protocol(row: CaseRow, protocol: Protocol) -> CaseRow:
    """Return a row as a protocol counts it: "paper" scores an empty mask 0 in the four metrics, in voxels."""
    if protocol == "default" or not row.empty:
        return row
    return replace(row, dice=0.0, jaccard=0.0, hd95=0.0, asd=0.0)


def summarise(rows: Sequence[CaseRow], protocol: Protocol = "default") -> list[SummaryRow]:
    """Average rows over the cases: for each predictor each structure, then "mean", the mean over the structures.

    Args:
        rows: from evaluate().
        protocol: "default" leaves nan distances out of the means; "paper" see apply_protocol().

    Returns:
        One row for each predictor and structure, in the order met.
    """
    rows = [apply_protocol(row, protocol) for row in rows]
    summary = []
    for predictor in dict.fromkeys(row.predictor for row in rows):
        mine = [row for row in rows if row.predictor == predictor]
        structures = list(dict.fromkeys(row.structure for row in mine))
        groups = {s: [[row] for row in mine if row.structure == s] for s in structures}
        if len(structures) > 1:
            groups[MEAN] = [[row for row in mine if row.case == case] for case in dict.fromkeys(r.case for r in mine)]
        summary += [_summary_row(predictor, structure, group) for structure, group in groups.items()]
    return summary


def _summary_row(predictor: str, structure: str, groups: Sequence[Sequence[CaseRow]]) -> SummaryRow:
    """Summarise groups of rows: each group is first averaged into one value a metric."""
    means, deviations, counts = {}, {}, {}
    for metric in METRICS:
        values = [_mean([getattr(row, metric) for row in group]) for group in groups]
        finite = [value for value in values if not math.isnan(value)]
        means[metric] = _mean(values)
        deviations[metric] = float(np.std(finite)) if finite else math.nan
        counts[metric] = len(finite)
    empty = sum(any(row.empty for row in group) for group in groups)
    return SummaryRow(predictor, structure, means, deviations, counts, empty)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return float(np.mean(finite)) if finite else math.nan


def case_dice(rows: Sequence[CaseRow]) -> dict[str, dict[str, float]]:
    """Return each predictor's Dice of each case: the mean over those structures that could be scored; nan for none."""
    groups: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        groups.setdefault(row.predictor, {}).setdefault(row.case, []).append(row.dice)
    return {name: {case: _mean(values) for case, values in cases.items()} for name, cases in groups.items()}


def mean_dice(rows: Sequence[CaseRow]) -> dict[str, float]:
    """Return each predictor's Dice as the table's "mean" has it, and as checkpoints are selected.

    The mean over the cases of case_dice(); nan only if nothing could be scored.
    """
    return {name: _mean(list(cases.values())) for name, cases in case_dice(rows).items()}


def format_cases(rows: Sequence[CaseRow]) -> str:
    """Return a line for each case and predictor: each metric of each structure, in the structures' order."""
    structures = list(dict.fromkeys(row.structure for row in rows))
    groups: dict[tuple[str, str], list[CaseRow]] = {}
    for row in rows:
        groups.setdefault((row.case, row.predictor), []).append(row)
    names = "/".join(structures)
    metrics = shown_metrics(rows)
    lines = [["case", "predictor", *(f"{METRICS[m]} {names}" for m in metrics)]]
    for (case, predictor), members in groups.items():
        cells = [" ".join(f"{getattr(row, m):.{_digits(m)}f}" for row in members) for m in metrics]
        lines.append([case, predictor, *cells])
    return _aligned(lines)


def shown_metrics(rows: Sequence[CaseRow]) -> list[str]:
    """List the metrics to show: distances in mm only where some spacing is known."""
    in_mm = any(not math.isnan(row.hd95_mm) for row in rows)
    return [metric for metric in METRICS if in_mm or not metric.endswith("_mm")]


def _digits(metric: str) -> int:
    return 4 if metric in ("dice", "jaccard") else 2


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Align cells in columns, with a rule under the first line."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def format_table(summary: Sequence[SummaryRow], protocol: Protocol = "default") -> str:
    """Return the summary as text: mean ± standard deviation, n where cases were left out, and empty masks' count."""
    metrics = [m for m in METRICS if any(row.counts[m] for row in summary) or not m.endswith("_mm")]
    header = ["predictor", "structure", *(METRICS[m] for m in metrics), "empty"]
    lines = [header]
    n = max((count for row in summary for count in row.counts.values()), default=0)
    for row in summary:
        cells = []
        for metric in metrics:
            digits = _digits(metric)
            left_out = f" (n={row.counts[metric]})" if row.counts[metric] < n else ""
            cells.append(f"{row.means[metric]:.{digits}f} ± {row.deviations[metric]:.{digits}f}{left_out}")
        lines.append([row.predictor, row.structure, *cells, str(row.empty)])
    rule = {
        "default": "an empty mask scores Dice 0 and its distances are left out",
        "paper": "the paper's protocol: an empty mask scores 0 in all four, which flatters the distances",
    }[protocol]
    return f"{_aligned(lines)}\nmean ± standard deviation over {n} cases; {rule}."
