"""The table of an experiment: each row over its patients and seeds, beside a reference row (docs/statistics.md)."""

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdcl.methods import get
from sdcl.runs.atomic import write_text
from sdcl.runs.errors import UserError
from sdcl.runs.folder import write_csv
from sdcl.runs.matrix import Run
from sdcl.scoring.statistics import compare, holm, interval
from sdcl.scoring.tables import MEAN, METRICS, aligned, digits_of, mean_of

LOWER_IS_BETTER = ("hd95", "asd", "hd95_mm", "asd_mm")
VOLUMES = ("voxels", "reference_voxels", "ml", "reference_ml")
LEAST_P = 0.0001  # that is printed as a number
SIGNIFICANT = 0.05  # of Holm's p; what is bold

# Of one seed's test: metric, structure to each case's value.
Scores = Mapping[tuple[str, str], Mapping[str, float]]
Key = tuple[int, str, str]  # key of a value: seed, case, structure


@dataclass(frozen=True)
class Row:
    """One cell of the table with its comparison; see docs/statistics.md.

    Attributes:
        method: the matrix's row, such as "sdcl:kl_weight=0".
        labelnum: labelled cases.
        predictor: which of the method's.
        structure: or "mean", over the structures of a case.
        metric: of tables.METRICS.
        patients: number of patients that the mean is over; nan ones are left out.
        values: number of values that the mean is over: one per case, seed and, of "mean", structure.
        left_out: number of values that are nan, such as the distances of an empty mask.
        mean: over the patients of each one's mean over its cases and the seeds; nan while seeds are missing.
        low, high: its 95 % t interval over the patients.
        seed_sd: standard deviation over the seeds of their means over the patients; nan of one seed.
        seed_low, seed_high: the smallest and largest of these.
        empty: empty masks, over cases and seeds.
        seeds_done, seeds_planned: how many.
        missing: the seeds that are missing.
        reference: the row that it is compared with; "" of the reference itself.
        difference: mean over patients of the paired differences to the reference. A value that is nan in one of the
            two rows is left out of both.
        difference_patients, difference_values: numbers of patients and of values in each row that it is over.
        more_left_out: more of the row's values are nan than of the reference's.
        difference_low, difference_high: its interval.
        p_permutation, p_wilcoxon, p_holm: of it.
        not_better: the probability that the row is not better than the reference.
        fingerprint: checksum of the cases, references and test settings; rows of one table have the same.
    """

    method: str
    labelnum: int
    predictor: str
    structure: str
    metric: str
    patients: int
    values: int
    left_out: int
    mean: float
    low: float
    high: float
    seed_sd: float
    seed_low: float
    seed_high: float
    empty: int
    seeds_done: int
    seeds_planned: int
    missing: str
    reference: str = ""
    difference: float = math.nan
    difference_patients: int = 0
    difference_values: int = 0
    more_left_out: bool = False
    difference_low: float = math.nan
    difference_high: float = math.nan
    p_permutation: float = math.nan
    p_wilcoxon: float = math.nan
    p_holm: float = math.nan
    not_better: float = math.nan
    fingerprint: str = ""

    @property
    def is_bold(self) -> bool:
        """Tell whether the row differs from the reference: with all seeds, and not by leaving out more distances."""
        flatters = self.more_left_out and self.metric in LOWER_IS_BETTER
        return not self.missing and self.p_holm < SIGNIFICANT and not flatters


@dataclass(frozen=True)
class Entry:
    """What the seeds of one method, labelled count and predictor scored.

    Attributes:
        method, labelnum, predictor: see Row.
        scores: by seed; those that are done.
        empty: number of empty masks by seed, by structure.
        planned: the seeds.
    """

    method: str
    labelnum: int
    predictor: str
    scores: dict[int, Scores]
    empty: dict[int, dict[str, int]]
    planned: tuple[int, ...]

    def values(self, metric: str, structure: str) -> dict[Key, float]:
        """Return the value of each seed, case and structure, nan ones included; of "mean" those of all structures."""
        found = {}
        for seed, scores in self.scores.items():
            structures = [s for m, s in scores if m == metric and s != MEAN] if structure == MEAN else []
            by_structure = {s: scores[metric, s] for s in structures or [structure]}
            for case in next(iter(by_structure.values())):
                found |= {(seed, case, s): values[case] for s, values in by_structure.items() if case in values}
        return found

    def patients(self, metric: str, structure: str, patient_of: Callable[[str], str]) -> dict[str, float]:
        """Return each patient's mean over cases and seeds; nan where none of them could be scored."""
        return of_patients(self.values(metric, structure), patient_of)


def of_patients(values: Mapping[Key, float], patient_of: Callable[[str], str]) -> dict[str, float]:
    """Return each patient's mean over the volumes and seeds, of each the mean over its structures."""
    volumes: dict[tuple[int, str], list[float]] = {}
    for (seed, case, _), value in values.items():
        volumes.setdefault((seed, case), []).append(value)
    patients: dict[str, list[float]] = {}
    for (_, case), each in volumes.items():
        patients.setdefault(patient_of(case), []).append(mean_of(each))
    return {patient: mean_of(each) for patient, each in patients.items()}


def read_cases(path: Path, predictor: str, kind: str) -> tuple[Scores, dict[str, int]] | None:
    """Read one predictor's scores from a test's cases.csv.

    Args:
        path: the file.
        predictor: its name, such as "mean".
        kind: "last" or "best", which of its checkpoints.

    Returns:
        The scores, "mean" of the structures included, and the number of empty masks by structure; None where the file
        has no such rows.
    """
    with open(path, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if is_of(row["predictor"], predictor, kind)]
    numbers = [*METRICS, *VOLUMES]
    return scores_of(
        [row | {n: float(row.get(n) or "nan") for n in numbers} | {"empty": row["empty"] == "True"} for row in rows]
    )


def scores_of(rows: Sequence[Mapping[str, Any]]) -> tuple[Scores, dict[str, int]] | None:
    """Arrange one predictor's rows, as CaseRow has them, by metric and structure; see read_cases()."""
    if not rows:
        return None
    scores: dict[tuple[str, str], dict[str, float]] = {}
    empty: dict[str, int] = {}
    for row in rows:
        empty[row["structure"]] = empty.get(row["structure"], 0) + row["empty"]
        for metric in (*METRICS, *VOLUMES):
            scores.setdefault((metric, row["structure"]), {})[row["case"]] = row[metric]
    structures = list(empty)
    if len(structures) > 1:
        empty[MEAN] = sum(empty.values())
        for metric in METRICS:
            cases = scores[metric, structures[0]]
            scores[metric, MEAN] = {case: mean_of([scores[metric, s][case] for s in structures]) for case in cases}
    return scores, empty


def is_of(title: str, predictor: str, kind: str) -> bool:
    """Tell whether "mean, best on val and last (250)" is a predictor's checkpoint of a kind."""
    name, _, rest = title.partition(", ")
    return name == predictor and (kind in rest.replace("(", " ").split())


def entries_of(tested: Sequence[Run], results: str, config: Any) -> list[Entry]:
    """Read what the runs of a matrix scored.

    Args:
        tested: those that are tested, in the matrix's order.
        results: the name of their tests' folders.
        config: experiments.py's header: its methods, labelnums, seeds, checkpoint and predictors.

    Returns:
        An entry for each method, labelled count and predictor of which some seed is there.
    """
    entries = []
    for labelnum in config.labelnums:
        for text in config.methods:
            mine = [run for run in tested if run.spec.text == text and run.labelnum == labelnum]
            names = list(get(text.partition(":")[0]).predictors)
            for name in names if config.predictors == "all" else names[-1:]:
                found = {
                    run.seed: read_cases(run.folder / "test" / results / "cases.csv", name, config.checkpoint)
                    for run in mine
                }
                found = {seed: one for seed, one in found.items() if one is not None}
                scores, empty = ({seed: one[k] for seed, one in found.items()} for k in (0, 1))
                entries.append(Entry(text, labelnum, name, scores, empty, tuple(config.seeds)))
    return entries


def reference_of(entries: Sequence[Entry], name: str) -> str:
    """Return the row that a name means, as "method/predictor"; of a method alone its own answer.

    Raises:
        UserError: it is none of the table's.
    """
    for entry in entries:
        answer = list(get(entry.method.partition(":")[0]).predictors)[-1]
        if name == f"{entry.method}/{entry.predictor}" or (name == entry.method and entry.predictor == answer):
            return f"{entry.method}/{entry.predictor}"
    known = ", ".join(f"{entry.method}/{entry.predictor}" for entry in entries)
    raise UserError(f"--reference {name} (the default is sdcl) is no row of this table: choose of {known}.")


def make_rows(entries: Sequence[Entry], patient_of: Callable[[str], str], reference: str) -> list[Row]:
    """Compute every cell, compared with the reference's row of the same labelled count.

    Args:
        entries: the table's rows, in order.
        patient_of: maps a case to its patient.
        reference: "method/predictor" of the row to compare with.
    """
    rows = []
    for labelnum in dict.fromkeys(entry.labelnum for entry in entries):
        group = [entry for entry in entries if entry.labelnum == labelnum]
        base = next((e for e in group if reference == f"{e.method}/{e.predictor}"), None)
        cells = dict.fromkeys(
            key for entry in group for scores in entry.scores.values() for key in scores if key[0] in METRICS
        )
        for metric, structure in cells:
            found = [_cell(entry, metric, structure, patient_of) for entry in group]
            if base is not None and len(base.scores) == len(base.planned):
                for i, entry in enumerate(group):
                    if entry is not base and len(entry.scores) == len(entry.planned):
                        found[i] = _compared(found[i], (entry, base), patient_of, reference)
            corrected = holm([row.p_permutation for row in found], planned=len(group) - 1)
            rows += [replace(row, p_holm=p) for row, p in zip(found, corrected, strict=True)]
    return rows


def _cell(entry: Entry, metric: str, structure: str, patient_of: Callable[[str], str]) -> Row:
    is_whole = len(entry.scores) == len(entry.planned)
    over = interval(list(entry.patients(metric, structure, patient_of).values()) if is_whole else [])
    alone = [replace(entry, scores={seed: entry.scores[seed]}) for seed in entry.scores]
    of_seeds = [mean_of(list(one.patients(metric, structure, patient_of).values())) for one in alone]
    of_seeds = [value for value in of_seeds if not math.isnan(value)]
    missing = " ".join(str(seed) for seed in entry.planned if seed not in entry.scores)
    values = entry.values(metric, structure).values()
    left_out = sum(math.isnan(value) for value in values)
    return Row(
        method=entry.method, labelnum=entry.labelnum, predictor=entry.predictor, structure=structure, metric=metric,
        patients=over.patients, values=len(values) - left_out, left_out=left_out,
        mean=over.mean, low=over.low, high=over.high,
        seed_sd=float(np.std(of_seeds, ddof=1)) if len(of_seeds) > 1 else math.nan,
        seed_low=min(of_seeds, default=math.nan), seed_high=max(of_seeds, default=math.nan),
        empty=sum(e.get(structure, 0) for e in entry.empty.values()),
        seeds_done=len(entry.scores), seeds_planned=len(entry.planned), missing=missing,
    )  # fmt: skip


def _compared(row: Row, both: tuple[Entry, Entry], patient_of: Callable[[str], str], reference: str) -> Row:
    """Compare a row with the reference, of which each has its entry, on the values that both have."""
    ours, theirs = (entry.values(row.metric, row.structure) for entry in both)
    shared = [key for key in ours if key in theirs and not math.isnan(ours[key] + theirs[key])]
    means = [of_patients({key: values[key] for key in shared}, patient_of) for values in (ours, theirs)]
    found = compare(list(means[0].values()), list(means[1].values()), row.metric in LOWER_IS_BETTER)
    change, empty = found.difference, [sum(map(math.isnan, values.values())) for values in (ours, theirs)]
    return replace(
        row, reference=reference, difference=change.mean, difference_low=change.low, difference_high=change.high,
        difference_patients=change.patients, difference_values=len(shared), more_left_out=empty[0] > empty[1],
        p_permutation=found.p_permutation, p_wilcoxon=found.p_wilcoxon, not_better=found.not_better,
    )  # fmt: skip


# --- how it looks ---


def lines_of(rows: Sequence[Row], metric: str, labelnum: int) -> list[list[str]]:
    """Return one metric's table, a line a method and predictor, the header first; bold cells are marked with **."""
    mine = [row for row in rows if row.metric == metric and row.labelnum == labelnum]
    structures = list(dict.fromkeys(row.structure for row in mine))
    structures = [MEAN, *(s for s in structures if s != MEAN)] if MEAN in structures else structures
    head = ["method", "predictor", "seeds", *(f"{s} [95 %]" for s in structures), "sd over seeds (range)"]
    head += ["n", "difference [95 %]", "p permutation", "p Wilcoxon", "p Holm", "P(not better)", "empty"]
    lines, digits = [head], digits_of(metric)
    for method, predictor in dict.fromkeys((row.method, row.predictor) for row in mine):
        cells = {row.structure: row for row in mine if (row.method, row.predictor) == (method, predictor)}
        first = cells[structures[0]]
        done = f"{first.seeds_done} of {first.seeds_planned}"
        line = [method, predictor, done + (f" (missing: {first.missing})" if first.missing else "")]
        for structure in structures:
            cell = cells[structure]
            text = _interval(cell.mean, cell.low, cell.high, digits) + _left_out(cell)
            line.append(f"**{text}**" if cell.is_bold else text)
        seeds = [_number(value, digits) for value in (first.seed_sd, first.seed_low, first.seed_high)]
        line.append("–" if first.missing else f"{seeds[0]} ({seeds[1]} to {seeds[2]})")
        line.append(str(first.patients))
        difference = _interval(first.difference, first.difference_low, first.difference_high, digits, sign="+")
        total = first.values + first.left_out
        if first.reference and (first.difference_patients, first.difference_values) != (first.patients, total):
            difference += f" (n = {first.difference_patients}; {first.difference_values} of {total} values)"
        line.append(difference)
        line += [_p_value(p) for p in (first.p_permutation, first.p_wilcoxon, first.p_holm, first.not_better)]
        lines.append([*line, str(first.empty)])
    return lines


def _left_out(cell: Row) -> str:
    """Say how many values a mean is over, where some are nan."""
    if math.isnan(cell.mean) or not cell.left_out:
        return ""
    return f" (n = {cell.patients}; {cell.values} of {cell.values + cell.left_out} values)"


def _p_value(value: float) -> str:
    return f"< {LEAST_P}" if value < LEAST_P else _number(value, 4)


def _number(value: float, digits: int, sign: str = "") -> str:
    return "–" if math.isnan(value) else f"{value:{sign}.{digits}f}"


def _interval(mean: float, low: float, high: float, digits: int, sign: str = "") -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:{sign}.{digits}f} [{_number(low, digits, sign)}, {_number(high, digits, sign)}]"


def write_table(folder: Path, rows: Sequence[Row], head: Sequence[str], costs: Sequence[dict[str, Any]]) -> str:
    """Write table.csv, table.json, table.md and table.tex, and return what is printed.

    Args:
        folder: where to.
        rows: from make_rows().
        head: sentences that stand above: what was selected, what is compared, which commits.
        costs: a row for each method and labelled count, which goes below.
    """
    plain = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(row).items()} for row in rows]
    write_text(folder / "table.json", json.dumps(plain, indent=1, allow_nan=False) + "\n")
    write_csv(folder / "table.csv", plain)
    text, marked, tex = list(head), [f"{line}  " for line in head], [f"% {line}" for line in head]
    shown = [m for m in METRICS if any(r.metric == m and not math.isnan(r.mean) for r in rows)] or ["dice"]
    for labelnum in dict.fromkeys(row.labelnum for row in rows):
        for metric in shown:
            title, lines = f"{METRICS[metric]}, {labelnum} labelled", lines_of(rows, metric, labelnum)
            text += ["", title, aligned([[cell.replace("**", "*") for cell in line] for line in lines])]
            marked += _marked(title, lines)
            tex += _tex(title, lines)
    if costs:
        lines = [
            [name.replace("_", " ") for name in costs[0]],
            *[[str(value) for value in row.values()] for row in costs],
        ]
        text += ["", "What a run costs", aligned(lines)]
        marked += _marked("What a run costs", lines)
        tex += _tex("What a run costs", lines)
    write_text(folder / "table.md", "\n".join(marked) + "\n")
    write_text(folder / "table.tex", "\n".join(tex) + "\n")
    return "\n".join(text)


def _marked(title: str, lines: Sequence[Sequence[str]]) -> list[str]:
    """Return a table in Markdown."""
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return ["", f"**{title}**", "", table[0], "|".join(["", *["---"] * len(lines[0]), ""]), *table[1:]]


def _tex(title: str, lines: Sequence[Sequence[str]]) -> list[str]:
    def escape(cell: str) -> str:
        is_bold = cell.startswith("**")
        plain = cell.strip("*")
        for letter in "&%_#":
            plain = plain.replace(letter, f"\\{letter}")
        plain = plain.replace("–", "--").replace("<", "$<$")
        return f"\\textbf{{{plain}}}" if is_bold else plain

    body = [" & ".join(map(escape, line)) + r" \\" for line in lines]
    columns = "l" * len(lines[0])
    return [f"% {title}", f"\\begin{{tabular}}{{{columns}}}", body[0], r"\hline", *body[1:], r"\end{tabular}", ""]
