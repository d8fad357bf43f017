"""What a validation and a test leave: a panel, tables, figures, files."""

import json
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from sdcl import ranks
from sdcl.runs.atomic import replacing, write_text
from sdcl.runs.distribution import collect, first, is_first, share, wait
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER, MACHINE_FIELDS, duration, write_csv
from sdcl.runs.written_files import check_replaceable, remove_written
from sdcl.scoring.evaluation import Case, CaseRow, Predictors, Task, Validation, evaluate, names_of
from sdcl.scoring.figures import class_colours, is_xyz, panel, save_case_figure, save_metrics_figure
from sdcl.scoring.fingerprint import fingerprint_of
from sdcl.scoring.scored import ScoredCases, key_of
from sdcl.scoring.tables import (
    case_dice,
    format_cases,
    format_table,
    mean_dice,
    shown_metrics,
    summarise,
)
from sdcl.scoring.viewer import Shown

NIFTI_FILES = ("image", "label", "prediction", "probability")  # per case, with --save_nifti
LOOKS = 30  # for what other processes have scored, a second apart


def validator(cases: Sequence[Case], task: Task) -> Callable[[Predictors], Validation] | None:
    """Return what the loops call to score a stage's predictors; the panel shows the first case.

    Args:
        cases: volumes to score; none: nothing can be validated, and None is returned.
        task: see evaluate().
    """
    if not cases:
        return None

    def validate(predictors: Predictors) -> Validation:
        panels = []

        def draw_first(case: Case, label_maps: dict[str, np.ndarray], _: dict[str, np.ndarray]) -> None:
            if not panels:
                maps = {name: label_maps[name] for name in predictors.single}
                panels.append(panel(case, maps, task.planes[0], is_xyz(task)))

        drawn = draw_first if is_first() else None
        rows = _in_order(evaluate(predictors, share(cases), task, distances=False, on_case=drawn), cases)
        dice = {name: 0.0 if math.isnan(value) else value for name, value in mean_dice(rows).items()}
        return Validation(dice, panels[0] if panels else None)

    return validate


def test_report(
    folder: Path,
    predictors: Predictors,
    cases: Sequence[Case],
    task: Task,
    facts: dict[str, Any],
    nifti: bool = False,
) -> None:
    """Score predictors; write tables, figures and the page; print the tables.

    Each case is kept as soon as it is scored, so that a test that was stopped goes on; cases.csv holds those that are
    done, and summary.json comes when all are.

    Args:
        folder: where to.
        predictors: those that cases.png shows first.
        cases: volumes to score.
        task: see evaluate().
        facts: what else summary.json says, such as the split; "protocol": see summarise().
        nifti: also write nifti/, of the answer, with ITK-SNAP's label description.
    """
    _check_outputs(folder, cases, nifti)
    test = _Test(folder, predictors, cases, task, facts, nifti)
    test.score()
    wait()
    if is_first():
        test.write()


def _check_outputs(folder: Path, cases: Sequence[Case], nifti: bool) -> None:
    """Check, before anything is scored, that no file of the user's lies where the test writes."""
    files = ["cases.csv", "summary.json", "cases.png", "metrics.png", "report.html", "training.png"]
    if nifti:
        files += ["nifti/labels.txt", *(f"nifti/{case.name}_{name}.nii.gz" for case in cases for name in NIFTI_FILES)]
    check_replaceable(*(folder / file for file in files))


class _Test:
    """A test's scores and label maps by case, kept one file a case; see test_report()."""

    def __init__(
        self,
        folder: Path,
        predictors: Predictors,
        cases: Sequence[Case],
        task: Task,
        facts: dict[str, Any],
        nifti: bool,
    ):
        self.folder, self.predictors, self.cases, self.task = folder, predictors, cases, task
        self.facts, self.nifti, self.method = facts, nifti, facts.get("method", "sdcl")
        settings = {k: v for k, v in facts.get("config", {}).items() if k not in MACHINE_FIELDS and k != "protocol"}
        made_by = {"predictors": predictors.members, "classes": task.class_names, "values": task.label_values}
        made_by |= {key: facts.get("environment", {}).get(key) for key in ("commit", "packages")}
        self.kept = ScoredCases(folder / "scored", key_of(predictors.networks, settings | made_by))
        self.rows_of: dict[str, list[CaseRow]] = {}
        self.label_maps: dict[str, dict[str, np.ndarray]] = {}

    def score(self) -> None:
        """Score this process's share of the cases that are not scored yet."""
        done = set(first(self._read_kept))
        if done:
            LOGGER.info(
                "going on with a test that was stopped: %d of %d volumes are scored", len(done), len(self.cases)
            )
        if is_first():  # an earlier test's: cases.csv, which is written as cases are scored, will be of this one
            for name in ("summary.json", "report.html", "cases.png", "metrics.png", "training.png"):
                remove_written(self.folder / name)
        number = len(self.predictors.members)
        LOGGER.info("scoring %d predictors on %d volumes", number, len(self.cases) - len(done))
        waiting = share([case for case in self.cases if case.name not in done])
        self.waiting, self.scored, self.begun_at = len(waiting), 0, time.perf_counter()
        predictors = self.predictors.keeping_answer() if self.nifti else self.predictors
        evaluate(predictors, waiting, self.task, on_case=self._keep_maps, on_scored=self._keep_rows)

    def write(self) -> None:
        """Write the tables and figures of all cases, those that other processes scored too."""
        self._read_others()
        shown, protocol = self.predictors.pictured, self.facts["protocol"]
        rows = self._rows()
        _write_cases(self.folder, self.method, rows)
        summary = summarise(rows, protocol)
        content = self.facts | {"summary": [{"method": self.method} | asdict(row) for row in summary]}
        content["fingerprint"] = fingerprint_of(self.cases, self.facts)
        text = json.dumps(_without_nan(content), indent=2, allow_nan=False)
        LOGGER.info("method %s\n\n%s\n\n%s", self.method, format_cases(rows), format_table(summary, protocol))
        dice, by_name = case_dice(rows)[shown[-1]], {case.name: case for case in self.cases}
        pictures = [
            (f"{rank}: Dice {dice[name]:.3f}", by_name[name], self.label_maps[name])
            for rank, name in best_median_worst(rows, shown[-1]).items()
        ]
        save_case_figure(self.folder / "cases.png", pictures, self.task, self.predictors)
        save_metrics_figure(self.folder / "metrics.png", rows, shown_metrics(rows))
        names = ["cases.csv", "summary.json", "cases.png", "metrics.png", *self._write_page(rows, content)]
        write_text(self.folder / "summary.json", f"{text}\n")  # last: it says that all of them are there
        if self.nifti:
            self._tell_snap()
        self.kept.remove()
        LOGGER.info("written to %s: %s", self.folder, ", ".join(names))

    def _write_page(self, rows: Sequence[CaseRow], content: dict[str, Any]) -> list[str]:
        """Write report.html, and training.png where the run's records are; return their names."""
        from sdcl.scoring.run_page import write_run_page  # with jinja2, which validations need not

        answer = self.predictors.pictured[-1]
        dice = case_dice(rows)[answer]
        ranks_of = {name: rank for rank, name in best_median_worst(rows, answer).items()}
        order = [name for rank in ("worst", "median", "best") for name, r in ranks_of.items() if r == rank]
        order += sorted((n for n in dice if n not in order), key=lambda n: (not math.isnan(dice[n]), dice[n]))
        by_name = {case.name: case for case in self.cases}
        shown = []
        for name in order:
            rank = f"{ranks_of[name]}: " if name in ranks_of else ""
            shown.append(Shown(f"{rank}{name}, Dice {dice[name]:.3f}", by_name[name], self.label_maps[name]))
        return write_run_page(self.folder, shown, rows, self.task, self.predictors, content)

    def _tell_snap(self) -> None:
        """Write the label description beside the NIfTI files, and say how ITK-SNAP opens a case with it."""
        folder = self.folder / "nifti"
        path = save_label_description(folder, self.task)
        files = [folder / f"{self.cases[0].name}_{name}.nii.gz" for name in ("image", "prediction")]
        command = shlex.join(["itksnap", "-g", str(files[0]), "-s", str(files[1]), "-l", str(path)])
        LOGGER.info(
            "a case in ITK-SNAP, with names and colours (_label instead of _prediction: the reference):\n%s", command
        )

    def _read_kept(self) -> list[str]:
        """Read the cases that are kept, and return the names of those that are there."""
        for case in self.cases:
            if case.name not in self.rows_of and (found := self.kept.load(case)) is not None:
                self.rows_of[case.name], self.label_maps[case.name] = found
        return list(self.rows_of)

    def _read_others(self) -> None:
        """Read what other processes have scored."""
        names = {case.name for case in self.cases}
        for look in range(LOOKS):  # a network's disk may show them late
            if not (missing := sorted(names - set(self._read_kept()))):
                return
            if look < LOOKS - 1:
                time.sleep(1)
        raise UserError(
            f"{self.folder} lacks what other processes scored ({missing[0]}): several machines need a --models_path "
            "that all of them see."
        )

    def _keep_maps(self, case: Case, maps: dict[str, np.ndarray], probabilities: dict[str, np.ndarray]) -> None:
        shown = self.predictors.pictured
        self.label_maps[case.name] = {name: maps[name] for name in shown}
        if self.nifti:
            save_nifti(self.folder / "nifti", case, maps[shown[-1]], probabilities[shown[-1]], self.task)

    def _keep_rows(self, case: Case, rows: list[CaseRow]) -> None:
        self.scored += 1
        if self.scored == 1 and self.waiting > 1:
            seconds = (time.perf_counter() - self.begun_at) * (self.waiting - 1)
            LOGGER.info("%s scored; about %s for the other %d", case.name, duration(seconds), self.waiting - 1)
        self.rows_of[case.name] = rows
        self.kept.save(case, rows, self.label_maps[case.name])
        if is_first():
            _write_cases(self.folder, self.method, self._rows())

    def _rows(self) -> list[CaseRow]:
        """Return the rows that are there, in the cases' order."""
        return [row for case in self.cases for row in self.rows_of.get(case.name, ())]


def _in_order(mine: list[CaseRow], cases: Sequence[Case]) -> list[CaseRow]:
    """Put together the rows that the processes scored, in the order of one process."""
    if ranks.count() == 1:
        return mine
    places = {name: i for i, name in enumerate(names_of(cases))}
    return sorted((row for rows in collect(mine) for row in rows), key=lambda row: places[row.case])


def _write_cases(folder: Path, method: str, rows: Sequence[CaseRow]) -> None:
    write_csv(folder / "cases.csv", [{"method": method} | asdict(row) for row in rows])


def save_nifti(
    folder: Path, case: Case, label_map: np.ndarray, probabilities: np.ndarray, task: Task | None = None
) -> None:
    """Write `<case>_{image,label,prediction,probability}.nii.gz`, in the HDF5 file's own order of axes.

    With the case's affine they lie where the scan lay; without it the affine holds the spacing, or 1 where unknown.

    Args:
        folder: where to.
        case: a volume; its image is written as (*S), or (*S, channels).
        label_map: (*S).
        probabilities: (C, *S); written as (*S, C - 1), the foreground classes, or (*S) for one.
        task: for the label files' own values; None: label maps hold classes.
    """
    affine = np.diag([*(case.spacing or (1.0,) * case.label.ndim), 1.0]) if case.affine is None else case.affine
    foreground = probabilities[1] if len(probabilities) == 2 else np.moveaxis(probabilities[1:], 0, -1)
    label, prediction = (array if task is None else task.original(array) for array in (case.label, label_map))
    image = case.image if case.image.ndim == case.label.ndim else np.moveaxis(case.image, 0, -1)
    for name, array in zip(NIFTI_FILES, (image, label, prediction, foreground), strict=True):
        picture = nibabel.Nifti1Image(array, affine)
        picture.header.set_xyzt_units("mm")
        with replacing(folder / f"{case.name}_{name}.nii.gz") as temporary:
            nibabel.save(picture, temporary)


def save_label_description(folder: Path, task: Task) -> Path:
    """Write labels.txt, ITK-SNAP's label description: each structure's value, colour and name; return its path.

    Args:
        folder: of the NIfTI files.
        task: for the structures' names and the values that label files have.
    """
    lines = ["# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL", '    0     0    0    0        0  0  0    "Clear Label"']
    values = task.label_values or range(1, task.num_classes)
    colours = np.rint(255 * class_colours(np.arange(1, task.num_classes))).astype(int)
    for value, (red, green, blue), name in zip(values, colours, task.class_names, strict=True):
        lines.append(
            f'{value:5d}   {red:3d}  {green:3d}  {blue:3d}        1  1  1    "{name.replace(chr(34), chr(39))}"'
        )
    path = folder / "labels.txt"
    write_text(path, "\n".join(lines) + "\n")
    return path


def _without_nan(value: Any) -> Any:
    """Replace nan, which JSON does not know, by None."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def best_median_worst(rows: Sequence[CaseRow], predictor: str) -> dict[str, str]:
    """Return "best", "median" and "worst" (two of two cases) to the case of that rank by a predictor's mean Dice."""
    scores = {case: 0.0 if math.isnan(dice) else dice for case, dice in case_dice(rows)[predictor].items()}
    ranked = sorted(scores, key=lambda case: -scores[case])
    if len(ranked) < 3:
        return dict(zip(("best", "worst"), ranked, strict=False))
    return {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
