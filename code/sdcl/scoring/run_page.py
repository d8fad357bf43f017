"""The page of one test: report.html, and training.png beside it."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdcl.scoring.charts import run_curves
from sdcl.scoring.comparison import Entry, make_rows, scores_of
from sdcl.scoring.evaluation import CaseRow, Predictors, Task
from sdcl.scoring.page import Page, Section, facts_table, write_page
from sdcl.scoring.tables import apply_protocol, selection_warning
from sdcl.scoring.viewer import Shown, viewer


def write_run_page(
    folder: Path,
    shown: Sequence[Shown],
    rows: Sequence[CaseRow],
    task: Task,
    predictors: Predictors,
    facts: dict[str, Any],
) -> list[str]:
    """Write a test's page, and its training curves as training.png where there are some; return the files' names.

    Args:
        folder: where to.
        shown: the cases with their label maps, those to be looked at first in front.
        rows: the scores.
        task: for the structures' names, the patients, and how axes are shown.
        predictors: which of them are single networks, and which is the answer.
        facts: what summary.json says; see test_report().
    """
    trained, environment = facts.get("trained_with", {}), facts.get("environment", {})
    method, seed = facts.get("method", "sdcl"), trained.get("seed", 0)
    entries = []
    for name in dict.fromkeys(row.predictor for row in rows):
        mine = [asdict(apply_protocol(row, facts["protocol"])) for row in rows if row.predictor == name]
        scores, empty = scores_of(mine)
        entries.append(Entry(method, trained.get("labelnum", 0), name, {seed: scores}, {seed: empty}, (seed,)))
    answer = predictors.pictured[-1]
    curves = run_curves({stage: Path(path) for stage, path in facts.get("records", {}).items()})
    pair = predictors.single if len(predictors.single) == 2 else []
    settings = [
        facts_table("test", facts.get("config", {})), facts_table("training", trained),
        facts_table("environment of the test", environment),
    ]  # fmt: skip
    page = Page(
        title=f"{method} on {task.name}: {facts['split']}, {len(shown)} volumes",
        head=_head(facts, task, answer, f"{method}/{answer}"),
        entries=entries,
        rows=make_rows(entries, task.patient_of, f"{method}/{answer}"),
        viewer=viewer(shown, task, pair) if all(one.case.label.ndim == 3 for one in shown) else None,
        curves=curves,
        further=[Section("settings", "Settings and environment", tables=settings)],
        order=[one.case.name for one in shown],
    )
    return write_page(folder, page)


def _head(facts: dict[str, Any], task: Task, answer: str, reference: str) -> list[str]:
    """Return the sentences at the page's top."""
    trained = facts.get("trained_with", {})
    lines = []
    if task.channels:
        lines.append(f"Pictures show the channel {task.channels[0]} of {', '.join(task.channels)}.")
    if trained:
        lines.append(
            f"{trained.get('labelnum', '?')} labelled cases, seed {trained.get('seed', '?')}; the answer is {answer}."
        )
    selected = facts.get("selected_on")
    if sentence := selection_warning({"selected_on": None} | facts):
        lines.append(f"WARNING: {sentence}")
    elif selected:
        lines.append(f"The best checkpoints were selected on {selected}.")
    if facts["protocol"] == "paper":
        lines.append("Protocol of the paper: an empty mask scores 0 in all four metrics, which flatters the distances.")
    if facts.get("trained_on"):
        lines.append(f"WARNING: {len(facts['trained_on'])} of these volumes were TRAINED on, which flatters the run.")
    if commits := facts.get("commits"):
        is_one = len(commits) == 1 and not commits[0].endswith("-dirty")
        lines.append(
            ("Trained with commit " if is_one else "WARNING: trained with code of ") + f"{', '.join(commits)}."
        )
    lines.append(f"Intervals are over patients, differences are to {reference}; docs/statistics.md says how.")
    return lines
