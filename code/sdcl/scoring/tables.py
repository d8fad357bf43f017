"""The tables that scores make: means over cases, standard deviations, protocols, and their text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from sdcl.scoring.evaluation import CaseRow

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
        values = [mean_of([getattr(row, metric) for row in group]) for group in groups]
        finite = [value for value in values if not math.isnan(value)]
        means[metric] = mean_of(values)
        deviations[metric] = float(np.std(finite)) if finite else math.nan
        counts[metric] = len(finite)
    empty = sum(any(row.empty for row in group) for group in groups)
    return SummaryRow(predictor, structure, means, deviations, counts, empty)


def mean_of(values: Sequence[float]) -> float:
    """Return the mean of the values that are not nan; nan for none."""
    finite = [value for value in values if not math.isnan(value)]
    return float(np.mean(finite)) if finite else math.nan


def case_dice(rows: Sequence[CaseRow]) -> dict[str, dict[str, float]]:
    """Return each predictor's Dice of each case: the mean over those structures that could be scored; nan for none."""
    groups: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        groups.setdefault(row.predictor, {}).setdefault(row.case, []).append(row.dice)
    return {name: {case: mean_of(values) for case, values in cases.items()} for name, cases in groups.items()}


def mean_dice(rows: Sequence[CaseRow]) -> dict[str, float]:
    """Return each predictor's Dice as the table's "mean" has it, and as checkpoints are selected.

    The mean over the cases of case_dice(); nan only if nothing could be scored.
    """
    return {name: mean_of(list(cases.values())) for name, cases in case_dice(rows).items()}


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
        cells = [" ".join(f"{getattr(row, m):.{digits_of(m)}f}" for row in members) for m in metrics]
        lines.append([case, predictor, *cells])
    return aligned(lines)


def shown_metrics(rows: Sequence[CaseRow]) -> list[str]:
    """List the metrics to show: distances in mm only where some spacing is known."""
    in_mm = any(not math.isnan(row.hd95_mm) for row in rows)
    return [metric for metric in METRICS if in_mm or not metric.endswith("_mm")]


def selection_warning(facts: Mapping[str, Any]) -> str:
    """Say which of a test's checkpoints were selected on the volumes that it scores; "" if none was.

    Args:
        facts: what summary.json says of the test; see sdcl.runs.experiment.test().
    """
    best, here = f"'best on {facts['selected_on']}'", facts.get("selected_here", facts["selected_on"] == facts["split"])
    start = "stage 1's best, from which self-training started, was too"
    if here and facts.get("start_selected_here"):
        return f"{best} was selected on these very volumes, and {start}, which flatters both it and 'last'."
    if here:
        return f"{best} was selected on these very volumes, which flatters it; 'last' was not."
    if facts.get("start_selected_here"):
        return (
            "stage 1's best, from which self-training started, was selected on these very volumes, which flatters all "
            "checkpoints."
        )
    return ""


def digits_of(metric: str) -> int:
    """Return how many decimals a metric is shown with."""
    return 4 if metric in ("dice", "jaccard") else 2


def aligned(lines: Sequence[Sequence[str]]) -> str:
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
            digits = digits_of(metric)
            left_out = f" (n={row.counts[metric]})" if row.counts[metric] < n else ""
            cells.append(f"{row.means[metric]:.{digits}f} ± {row.deviations[metric]:.{digits}f}{left_out}")
        lines.append([row.predictor, row.structure, *cells, str(row.empty)])
    rule = {
        "default": "an empty mask scores Dice 0 and its distances are left out",
        "paper": "the paper's protocol: an empty mask scores 0 in all four, which flatters the distances",
    }[protocol]
    return f"{aligned(lines)}\nmean ± standard deviation over {n} cases; {rule}."
