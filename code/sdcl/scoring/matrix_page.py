"""The page of an experiment: report.html beside its tables, made of its runs' tests."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcl.methods import get
from sdcl.runs.errors import UserError
from sdcl.runs.folder import read_config, write_csv
from sdcl.runs.matrix import Run
from sdcl.scoring.charts import answer_curves, by_case
from sdcl.scoring.comparison import Entry, Row, is_of
from sdcl.scoring.page import PAGE, Page, Section, Table, facts_table, write_page
from sdcl.scoring.tables import MEAN
from sdcl.scoring.viewer import joined, read_viewer

# What is looked at first of so many cases, ranked by the reference row's Dice.
RANKS = {"worst": lambda n: 0, "median": lambda n: (n - 1) // 2, "best": lambda n: n - 1}


@dataclass(frozen=True)
class Compared:
    """What an experiment's table says.

    Attributes:
        entries: its rows, with each case's scores.
        rows: its cells.
        head: sentences above it.
        costs: of its runs, a row each.
        reference: the row that the others are compared with.
    """

    entries: Sequence[Entry]
    rows: Sequence[Row]
    head: Sequence[str]
    costs: Sequence[dict[str, Any]]
    reference: str


def write_matrix_page(folder: Path, config: Any, tested: Sequence[Run], results: str, compared: Compared) -> list[str]:
    """Write an experiment's page, and its training curves as training.png; return the files' names.

    Args:
        folder: where to.
        config: experiments.py's header.
        tested: the runs that are tested.
        results: the name of their tests' folders.
        compared: the table.
    """
    order = ranked(compared)
    curves = []
    for run in tested:
        stages = {"pre_train": (run.needs or run).folder / "pre_train", "self_train": run.folder / "self_train"}
        answer = list(get(run.spec.method).predictors)[-1]
        curves.append(answer_curves(run.spec.text, run.title, answer, stages))
    pictures, said = _viewer(config, tested, results, compared, order)
    links = [(run.title, _address(run.folder / "test" / results / PAGE, folder)) for run in tested]
    further = [Section("runs", "Each run's own page", links=links)]
    if compared.costs:
        lines = [[name.replace("_", " ") for name in compared.costs[0]]]
        lines += [[str(value) for value in row.values()] for row in compared.costs]
        further.insert(0, Section("costs", "What a run costs", tables=[Table("a row each", lines, is_open=True)]))
    facts = [facts_table("experiment", {k: str(v) for k, v in vars(config).items()})]
    facts += [facts_table(run.title, read_config(run.folder)) for run in tested]
    further.append(Section("settings", "Settings", tables=facts))
    page = Page(
        title=f"{config.name}: {len(compared.entries)} rows on {config.data_set}",
        head=[*compared.head, *said], entries=compared.entries, rows=compared.rows, viewer=pictures, curves=curves,
        further=further, order=order,
    )  # fmt: skip
    return write_page(folder, page)


def ranked(compared: Compared) -> list[str]:
    """List the cases: the reference row's worst, median and best in Dice, then the others from the worst on."""
    scored = [entry for entry in compared.entries if entry.scores]
    alike = [e for e in scored if f"{e.method}/{e.predictor}" == compared.reference] or scored
    structures = dict.fromkeys(row.structure for row in compared.rows)
    dice = by_case(alike[0], "dice", MEAN if MEAN in structures else next(iter(structures))) if alike else {}
    worst_first = sorted(dice, key=lambda case: (dice[case], case))
    first = dict.fromkeys(worst_first[place(len(worst_first))] for place in RANKS.values()) if worst_first else ()
    known = [case for e in scored for by in e.scores.values() for cases in by.values() for case in cases]
    return list(dict.fromkeys([*first, *worst_first, *known]))  # those without a Dice come last


def _viewer(
    config: Any, tested: Sequence[Run], results: str, compared: Compared, order: Sequence[str]
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the answers of all rows on each case, of the first seed that is there, and what is to be said of it."""
    seeds = [seed for seed in config.seeds if any(run.seed == seed for run in tested)]
    counts = {entry.labelnum for entry in compared.entries}
    of_rows, missing = {}, []
    for entry in compared.entries:
        name = f"{entry.method}/{entry.predictor}" + (f", {entry.labelnum} labelled" if len(counts) > 1 else "")
        run = next(
            (r for r in tested if (r.spec.text, r.labelnum, r.seed) == (entry.method, entry.labelnum, seeds[0])), None
        )
        try:
            data = read_viewer(run.folder / "test" / results / PAGE) if run else None
        except UserError:
            data = None
        title = data and next((n for n in data["names"] if is_of(n, entry.predictor, config.checkpoint)), None)
        if title is None:
            missing.append(name)
        else:
            of_rows[name] = (data, title)
    said = [f"The pictures are of seed {seeds[0]}."] if of_rows else []
    if missing:
        said.append(f"No pictures of {', '.join(missing)}: the page of its run's test is not there or shows others.")
    pictures = joined(of_rows, order) if of_rows else None
    return (pictures if pictures and pictures["cases"] else None), said


def _address(page: Path, folder: Path) -> str:
    """Return a page's address as seen from a folder, so that both may move together."""
    try:
        return "../" + page.resolve().relative_to(folder.resolve().parent).as_posix()
    except ValueError:
        return page.resolve().as_uri()


def write_all_cases(path: Path, tested: Sequence[Run], results: str) -> None:
    """Write the rows of all tests' cases.csv into one file, each with its run, labelled count and seed."""
    rows = []
    for run in tested:
        with open(run.folder / "test" / results / "cases.csv", encoding="utf-8", newline="") as file:
            first = {"row": run.spec.text, "labelnum": run.labelnum, "seed": run.seed}
            rows += [first | row for row in csv.DictReader(file)]
    columns = dict.fromkeys(name for row in rows for name in row)
    write_csv(path, [{name: row.get(name, "") for name in columns} for row in rows])
