"""The page's charts: volumes, cases, intervals and training curves, as figures that the page makes SVG of."""

import csv
import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sdcl.scoring.comparison import Entry, Row
from sdcl.scoring.figures import class_colours
from sdcl.scoring.tables import MEAN, METRICS

INK = "#010203"  # stands for the page's colour of text, which SVG takes over
# Okabe and Ito's colours, for rows; further rows have them again, dashed.
ROW_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("solid", "dashed", "dotted", "dashdot")
LIMITS = 1.96  # standard deviations of Bland and Altman's limits of agreement
CURVE_POINTS = 120  # of a curve; each is the mean of the iterations that it stands for
STAGES = {"pre_train": "stage 1, pre-training", "self_train": "stage 2, self-training"}
QUANTITIES = {
    "loss": "loss",
    "val_dice": "Dice on the validation cases",
    "test_dice": "Dice on the TEST cases, which selects (as published)",
    "discrepancy": "voxels of a step where the students disagree",
}


@dataclass(frozen=True)
class Chart:
    """A figure, and what its points are called.

    Attributes:
        figure: drawn in INK.
        points: a name for each point of each group of points, by the group's gid.
        caption: what it shows, for those who cannot see it too.
    """

    figure: Figure
    points: Mapping[str, Sequence[str]]
    caption: str


@contextmanager
def inked() -> Iterator[None]:
    """Draw text, axes and ticks in INK while the block runs."""
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    ink = dict.fromkeys(names, INK) | {"svg.fonttype": "none", "font.size": 9, "axes.titlesize": 9}
    with matplotlib.rc_context(ink):
        yield


def row_style(place: int) -> tuple[str, str]:
    """Return the colour and the line style of a row by its place."""
    return ROW_COLOURS[place % len(ROW_COLOURS)], DASHES[place // len(ROW_COLOURS) % len(DASHES)]


def by_case(entry: Entry, metric: str, structure: str) -> dict[str, float]:
    """Return each case's mean over the seeds that are there, nan left out."""
    values: dict[str, list[float]] = {}
    for scores in entry.scores.values():
        for case, value in scores.get((metric, structure), {}).items():
            if not math.isnan(value):
                values.setdefault(case, []).append(value)
    return {case: statistics.fmean(each) for case, each in values.items()}


def structures_of(entries: Sequence[Entry]) -> list[str]:
    """List the structures that were scored, without their mean."""
    found = dict.fromkeys(s for e in entries for scores in e.scores.values() for _, s in scores)
    return [structure for structure in found if structure != MEAN]


def bland_altman(entry: Entry, drawn: Collection[str] | None = None) -> Chart | None:
    """Draw predicted minus reference volume against their mean, a panel a structure (Bland and Altman 1986).

    Each seed's prediction of a case is a point of its own. In ml where the spacing of every case is known, else in
    voxels; None where no volumes are known, as of tests of earlier versions.

    Args:
        entry: the row of the table.
        drawn: cases whose points are drawn; None: all. The lines are of all cases.
    """
    structures = structures_of([entry])
    of_structure = {
        unit: {structure: _volumes(entry, unit, structure) for structure in structures} for unit in ("ml", "voxels")
    }
    unit = "ml" if all(map(len, of_structure["ml"].values())) else "voxels"
    if sum(map(len, of_structure["ml"].values())) != sum(map(len, of_structure["voxels"].values())):
        unit = "voxels"
    if not any(of_structure[unit].values()):
        return None
    columns = min(len(structures), 3)
    rows = math.ceil(len(structures) / columns)
    figure = _figure(4.2 * columns, 3.6 * rows)
    plots = figure.subplots(rows, columns, squeeze=False).ravel()
    points, colours = {}, class_colours(np.arange(1, len(structures) + 1))
    for plot in plots[len(structures) :]:
        plot.remove()
    for k, (plot, structure) in enumerate(zip(plots, structures, strict=False)):
        pairs = of_structure[unit][structure]
        difference = np.array([ours - theirs for ours, theirs in pairs.values()])
        shown = {(c, seed): both for (c, seed), both in pairs.items() if drawn is None or c in drawn}
        middle = [(ours + theirs) / 2 for ours, theirs in shown.values()]
        heights = [ours - theirs for ours, theirs in shown.values()]
        points[f"volumes-{k}"] = [
            f"{case if len(entry.scores) == 1 else f'{case}, seed {seed}'}: {ours:.4g} {unit} predicted, "
            f"{theirs:.4g} in the reference"
            for (case, seed), (ours, theirs) in shown.items()
        ]
        plot.scatter(
            middle, heights, s=26, color=colours[k], edgecolor=INK, linewidths=0.4, gid=f"volumes-{k}", zorder=3
        )
        said = "no volumes"
        if len(difference):
            bias, spread = difference.mean(), difference.std(ddof=1) if len(difference) > 1 else math.nan
            plot.axhline(bias, color=INK, linewidth=1.2)
            said = f"bias {bias:+.3g} {unit}"
        plot.axhline(0, color=INK, linewidth=0.5)
        if len(difference) > 1:
            for limit in (bias - LIMITS * spread, bias + LIMITS * spread):
                plot.axhline(limit, color=INK, linewidth=1, linestyle="dashed")
            said += f", limits {bias - LIMITS * spread:+.3g} to {bias + LIMITS * spread:+.3g}"
        _titled(plot, f"{structure}: {said}")
        plot.set_xlabel(f"mean of both volumes [{unit}]")
        plot.set_ylabel(f"predicted − reference [{unit}]")
    each = "a case" if len(entry.scores) == 1 else "a case and seed"
    caption = (
        f"Volume of {_name(entry)} against the reference, a point {each} (Bland–Altman): the line is the mean "
        "difference, the dashed ones are 1.96 standard deviations of the differences away."
    )
    return Chart(figure, points, caption)


def _volumes(entry: Entry, unit: str, structure: str) -> dict[tuple[str, int], tuple[float, float]]:
    """Return each case's and seed's predicted and reference volume, where both are known."""
    found = {}
    for seed, scores in entry.scores.items():
        theirs = scores.get((f"reference_{unit}", structure), {})
        for case, ours in scores.get((unit, structure), {}).items():
            if not math.isnan(ours) and not math.isnan(theirs.get(case, math.nan)):
                found[case, seed] = ours, theirs[case]
    return found


def case_points(entries: Sequence[Entry], metric: str, drawn: Collection[str] | None = None) -> Chart:
    """Draw each case as a point, a column a row of the table and a panel a structure; lines join a case's points.

    Args:
        entries: the rows of the table.
        metric: of tables.METRICS.
        drawn: cases whose points are drawn; None: all. The means are over all cases.
    """
    structures = structures_of(entries)
    structures = [MEAN, *structures] if len(structures) != 1 else structures
    columns = min(len(structures), 2)
    rows = math.ceil(len(structures) / columns)
    figure = _figure(min(13, columns * (1.6 + 0.75 * len(entries))), 3.9 * rows)
    points = {}
    plots = figure.subplots(rows, columns, squeeze=False).ravel()
    for plot in plots[len(structures) :]:
        plot.remove()
    for k, (plot, structure) in enumerate(zip(plots, structures, strict=False)):
        values = [by_case(entry, metric, structure) for entry in entries]
        for case in dict.fromkeys(case for each in values for case in each if drawn is None or case in drawn):
            plot.plot([each.get(case, math.nan) for each in values], color=INK, linewidth=0.5, alpha=0.25, zorder=1)
        for i, (entry, each) in enumerate(zip(entries, values, strict=True)):
            gid, (colour, _) = f"{metric}-{k}-{i}", row_style(i)
            shown = {case: value for case, value in each.items() if drawn is None or case in drawn}
            plot.scatter([i] * len(shown), list(shown.values()), s=20, color=colour, linewidths=0, gid=gid, zorder=2)
            points[gid] = [f"{case}, {_name(entry)}, {structure}: {value:.4g}" for case, value in shown.items()]
            if each:
                plot.hlines(statistics.fmean(each.values()), i - 0.3, i + 0.3, color=INK, linewidth=1.6, zorder=3)
        plot.set_xticks(range(len(entries)), [_name(e) for e in entries], rotation=35, ha="right", fontsize=7)
        plot.set_xlim(-0.5, len(entries) - 0.5)
        _titled(plot, f"{METRICS[metric]}, {structure}")
        plot.grid(axis="y", alpha=0.25)
    caption = (
        f"{METRICS[metric]} of each case (the mean of its seeds, where there are several), a column a row of the "
        "table; thin lines join the same case, bars are means over the cases. Point at one for its name."
    )
    return Chart(figure, points, caption)


def forest(rows: Sequence[Row], metric: str, structure: str) -> Chart:
    """Draw the table's means with their 95 % intervals, and the differences to the reference row with theirs."""
    mine = [row for row in rows if (row.metric, row.structure) == (metric, structure)][::-1]
    figure = _figure(11, 1.3 + 0.34 * len(mine))
    points = {}
    shown = (("mean", "low", "high", ""), ("difference", "difference_low", "difference_high", "+"))
    plots = figure.subplots(1, 2, sharey=True)
    for k, (plot, (name, low, high, sign)) in enumerate(zip(plots, shown, strict=True)):
        there = [(i, row) for i, row in enumerate(mine) if not math.isnan(getattr(row, name))]
        for i, row in there:
            ends = [getattr(row, low), getattr(row, high)]
            plot.plot(ends, [i, i], color=row_style(len(mine) - 1 - i)[0], linewidth=2, zorder=1)
        gid = f"forest-{k}"
        plot.scatter([getattr(r, name) for _, r in there], [i for i, _ in there], s=30, color=INK, gid=gid, zorder=2)
        points[gid] = [
            f"{_name(r)}: {getattr(r, name):{sign}.4g} [{getattr(r, low):{sign}.4g}, {getattr(r, high):{sign}.4g}]"
            for _, r in there
        ]
        plot.grid(axis="x", alpha=0.25)
    reference = next((row.reference for row in mine if row.reference), "")
    plots[1].axvline(0, color=INK, linewidth=0.8)
    plots[0].set_yticks(range(len(mine)), [_name(row) for row in mine], fontsize=8)
    plots[0].set_ylim(-0.6, len(mine) - 0.4)
    _titled(plots[0], f"{METRICS[metric]}, {structure}: mean over patients, 95 %")
    _titled(plots[1], f"difference to {reference}, 95 %" if reference else "no difference to show")
    return Chart(figure, points, "The table's means and differences with their 95 % intervals over the patients.")


# --- training ---

# Of one row's runs or of one run's predictors: by stage and quantity the iterations and values.
Curve = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Curves:
    """A run's curves, or one predictor's.

    Attributes:
        name: what the legend calls it; curves of one name share colour and switch.
        title: what a single one is called.
        values: by stage and quantity; as read_metrics() returns them.
    """

    name: str
    title: str
    values: Mapping[tuple[str, str], Curve]


def read_metrics(path: Path) -> dict[str, Curve]:
    """Read a stage's metrics.csv: for each column that holds numbers the iterations and their values."""
    columns: dict[str, Curve] = {}
    if not path.exists():
        return columns
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            number = row.get("iteration") or ""
            for name, text in row.items():
                value = _number(text) if name and name != "iteration" and number.isdecimal() else None
                if value is not None:
                    iterations, values = columns.setdefault(name, ([], []))
                    iterations.append(int(number))
                    values.append(value)
    return columns


def _number(text: Any) -> float | None:
    """Read a number; None of what is none, such as a torn line's end."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def run_curves(folders: Mapping[str, Path]) -> list[Curves]:
    """Return a run's curves: each student's losses, each predictor's validation, and where the students disagree.

    Args:
        folders: of its stages.
    """
    by_name: dict[str, dict[tuple[str, str], Curve]] = {}
    for stage, folder in folders.items():
        for column, curve in read_metrics(folder / "metrics.csv").items():
            first, _, second = column.partition("/")
            if second == "loss":
                by_name.setdefault(first, {})[stage, "loss"] = curve
            elif first in ("val_dice", "test_dice"):
                by_name.setdefault(second, {})[stage, first] = curve
            elif column == "discrepancy":
                by_name.setdefault("both students", {})[stage, "discrepancy"] = curve
    return [Curves(name.replace("_", " "), name, values) for name, values in by_name.items()]


def answer_curves(name: str, title: str, answer: str, folders: Mapping[str, Path]) -> Curves:
    """Return a run's curves as one: its students' mean loss, its answer's validation, and where students disagree.

    Args:
        name: of the table's row.
        title: of the run.
        answer: the predictor whose validation is shown.
        folders: of its stages.
    """
    values: dict[tuple[str, str], Curve] = {}
    for stage, folder in folders.items():
        columns = read_metrics(folder / "metrics.csv")
        losses = [curve for column, curve in columns.items() if column.endswith("/loss")]
        if losses and len({len(of) for of, _ in losses}) == 1:
            means = [statistics.fmean(each) for each in zip(*(values for _, values in losses), strict=True)]
            values[stage, "loss"] = losses[0][0], means
        for column in (f"val_dice/{answer}", f"test_dice/{answer}", "discrepancy"):
            if column in columns:
                values[stage, column.partition("/")[0]] = columns[column]
    return Curves(name, title, values)


def training(curves: Sequence[Curves]) -> Chart | None:
    """Draw the curves of both stages: losses, validation Dice and discrepancy; None where there is nothing to draw."""
    there = {key for one in curves for key in one.values}
    stages, quantities = ([k for k in known if any(k in key for key in there)] for known in (STAGES, QUANTITIES))
    if not there:
        return None
    names = list(dict.fromkeys(one.name for one in curves))
    figure = _figure(min(13, 6.2 * len(stages)), 2.7 * len(quantities) + 0.3)
    plots = figure.subplots(len(quantities), len(stages), squeeze=False)
    for (i, quantity), (j, stage) in ((a, b) for a in enumerate(quantities) for b in enumerate(stages)):
        plot: Axes = plots[i, j]
        if (stage, quantity) not in there:
            plot.remove()
            continue
        for k, one in enumerate(curves):
            if (stage, quantity) not in one.values:
                continue
            place = names.index(one.name)
            colour, dashes = row_style(place)
            x, y = binned(*one.values[stage, quantity])
            marker = "o" if quantity.endswith("_dice") else None
            gid = f"curve-{place}-{i}-{j}-{k}"
            plot.plot(x, y, color=colour, linestyle=dashes, linewidth=1.2, marker=marker, markersize=3, gid=gid)
        _titled(plot, f"{QUANTITIES[quantity]}, {STAGES[stage]}")
        plot.set_xlabel("iteration")
        plot.grid(alpha=0.25)
    handles = []
    for k, name in enumerate(names):
        colour, dashes = row_style(k)
        handles.append(Line2D([], [], color=colour, linestyle=dashes, label=name))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 5), frameon=False, fontsize=8)
    caption = (
        f"Training by iteration: losses and discrepancy are means of up to {CURVE_POINTS} equal parts of a stage, "
        "Dice is as it was measured."
    )
    return Chart(figure, {}, caption)


def binned(iterations: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return a curve of at most CURVE_POINTS points, each the mean of neighbouring iterations; nan is left out."""
    pairs = np.array([iterations, values], float)
    pairs = pairs[:, np.isfinite(pairs[1])]
    parts = np.array_split(pairs, min(CURVE_POINTS, max(pairs.shape[1], 1)), axis=1)
    means = np.array([part.mean(1) for part in parts if part.size]).reshape(-1, 2)
    return means[:, 0], means[:, 1]


# --- how they are drawn ---


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _titled(plot: Axes, title: str) -> None:
    plot.set_title(title, fontsize=8)


def _name(row: Entry | Row) -> str:
    return f"{row.method}/{row.predictor}"
