"""What a person looks at: the panel that TensorBoard shows, a test's figure and its files."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

from sdcl.runs.atomic import replacing, write_text
from sdcl.runs.folder import LOGGER, MACHINE_FIELDS, write_csv
from sdcl.scoring.evaluation import (
    METRICS,
    Case,
    CaseRow,
    Predictors,
    Protocol,
    Task,
    Validation,
    case_dice,
    evaluate,
    format_cases,
    format_table,
    mean_dice,
    shown_metrics,
    summarise,
)
from sdcl.scoring.scored import ScoredCases, key_of

# Okabe and Ito's colour-blind-safe colours, by foreground class.
CLASS_COLOURS = np.array([(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178)]) / 255
DISCREPANCY_COLOUR = np.array((213, 94, 0)) / 255
OVERLAY = 0.55  # opacity of labels over the image
FIGURE_DPI = 120
PLANE_NAMES = ("sagittal", "coronal", "axial")  # slices across x, y, z


def is_xyz(task: Task) -> bool:
    """Tell whether volumes have the axes x, y, z, shown across each; else they are slices, rows, columns."""
    return len(task.planes) > 1


def fullest_slice(label: np.ndarray, axis: int) -> int:
    """Return the index, along an axis, of the slice of a label map (*S) with most foreground."""
    others = tuple(a for a in range(label.ndim) if a != axis)
    return int(np.count_nonzero(label, axis=others).argmax())


def class_colours(classes: np.ndarray) -> np.ndarray:
    """Return the colours (..., 3) in [0, 1] of foreground classes (...), from 1 on; after the last they begin anew."""
    return CLASS_COLOURS[(classes.astype(int) - 1) % len(CLASS_COLOURS)]


def overlay(image: np.ndarray, label: np.ndarray, colour: np.ndarray | None = None) -> np.ndarray:
    """Paint a label map over a slice.

    Args:
        image: (H, W), any range.
        label: (H, W), classes; 0 is left unpainted.
        colour: (3,) in [0, 1], for all classes; None: each class its own.

    Returns:
        RGB (H, W, 3) in [0, 1].
    """
    low, high = np.percentile(image, (1, 99))
    grey = np.clip((image - low) / max(high - low, 1e-8), 0, 1)[..., None].repeat(3, axis=-1)
    painted = (label > 0)[..., None]
    paint = class_colours(label) if colour is None else colour
    return np.where(painted, (1 - OVERLAY) * grey + OVERLAY * paint, grey)


def slice_of(volume: np.ndarray, k: int, axis: int, is_xyz: bool) -> np.ndarray:
    """Return a volume's slice (H, W); of axes x, y, z shown with x or y to the right, and z upwards."""
    picture = np.take(volume, k, axis)
    if not is_xyz:
        return picture
    return picture.T if axis == 2 else picture.T[::-1]


def views(case: Case, label_maps: Mapping[str, np.ndarray], axis: int, is_xyz: bool) -> dict[str, np.ndarray]:
    """Return pictures of one case's fullest slice, RGB (H, W, 3) in [0, 1], by title.

    Args:
        case: a volume (*S) of three dimensions.
        label_maps: of one network or of two (*S), by name.
        axis: across which to slice.
        is_xyz: the axes are x, y, z; else slices, rows, columns.

    Returns:
        The image, the reference, each label map, and of two where they disagree.
    """
    k = fullest_slice(case.label, axis)
    image, reference = (slice_of(v, k, axis, is_xyz) for v in (case.image, case.label))
    maps = {name: slice_of(label, k, axis, is_xyz) for name, label in label_maps.items()}
    shown = {
        f"{case.name}, {PLANE_NAMES[axis] if is_xyz else 'slice'} {k + 1}": overlay(image, np.zeros_like(reference)),
        "reference": overlay(image, reference),
    }
    shown |= {name.split(",")[0].replace("_", " "): overlay(image, label) for name, label in maps.items()}
    if len(maps) == 2:
        a, b = maps.values()
        shown[_disagreement(label_maps)] = overlay(image, a != b, DISCREPANCY_COLOUR)
    return shown


def _disagreement(names: Iterable[str]) -> str:
    return "students disagree" if all("student" in name for name in names) else "they disagree"


def panel(case: Case, label_maps: Mapping[str, np.ndarray], axis: int, is_xyz: bool = False) -> np.ndarray:
    """Return the views of a case side by side, (3, H, width) in [0, 1]."""
    return np.concatenate(list(views(case, label_maps, axis, is_xyz).values()), axis=1).transpose(2, 0, 1)


def save_case_figure(
    path: Path, cases: Sequence[tuple[str, Case, Mapping[str, np.ndarray]]], task: Task, predictors: Predictors
) -> None:
    """Draw for each case, across each plane, the views, and on the image the contours of reference and answer.

    Args:
        path: PNG to write.
        cases: title, volume, and label maps by predictor.
        task: for the planes and the structures' names.
        predictors: which of them are single networks, and which is the answer.
    """
    colours = class_colours(np.arange(1, task.num_classes))
    rows = [(title, case, maps, axis) for title, case, maps in cases for axis in task.planes]
    single, answer = predictors.single, predictors.pictured[-1]
    columns = 2 + len(single) + (len(single) == 2)
    figure = Figure(figsize=(2.6 * columns, 2.9 * len(rows) + 0.5), dpi=FIGURE_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, case, maps, axis) in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        shown = views(case, {name: maps[name] for name in single}, axis, is_xyz(task))
        for plot, (name, picture) in zip(axes, shown.items(), strict=True):
            plot.imshow(picture)
            plot.set_title(name, fontsize=8)
            plot.set_xticks([])
            plot.set_yticks([])
        k = fullest_slice(case.label, axis)
        for label, of_reference in ((case.label, True), (maps[answer], False)):
            for c in range(1, task.num_classes):
                mask = slice_of(label, k, axis, is_xyz(task)) == c
                if mask.any():
                    colour, style = (colours[c - 1], "solid") if of_reference else ("white", "dashed")
                    axes[0].contour(mask, levels=[0.5], colors=[colour], linestyles=style, linewidths=1)
        axes[0].set_ylabel(title, fontsize=9)
    handles = [Patch(color=colour, label=name) for colour, name in zip(colours, task.class_names, strict=True)]
    handles += [Patch(color=DISCREPANCY_COLOUR, label=_disagreement(single))] * (len(single) == 2)
    named = "mean of the students" if len(predictors.members[answer]) > 1 else answer.split(",")[0].replace("_", " ")
    handles += [
        Line2D([], [], color="grey", label="reference"),
        Line2D([], [], color="lightgrey", linestyle="dashed", label=f"{named} (white)"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    _save_figure(figure, path)


def save_label_figure(path: Path, cases: Sequence[Case], class_names: Sequence[str], is_xyz: bool) -> None:
    """Draw labelled volumes with the contours of their labels, a row a case, across three planes or in three slices.

    Args:
        path: PNG to write; its folder is there.
        cases: volumes (*S) of three dimensions.
        class_names: of the foreground classes.
        is_xyz: the axes are x, y, z; else slices, rows, columns, of which three slices are shown.
    """
    colours = class_colours(np.arange(1, len(class_names) + 1))
    figure = Figure(figsize=(10, 3.2 * len(cases) + 0.4), dpi=FIGURE_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, case in zip(figure.subplots(len(cases), 3, squeeze=False), cases, strict=True):
        depth = len(case.image)
        places = [(0, depth * k // 4) for k in (1, 2, 3)]
        places = [(axis, fullest_slice(case.label, axis)) for axis in (2, 1, 0)] if is_xyz else places
        for plot, (axis, k) in zip(axes, places, strict=True):
            image, label = (slice_of(array, k, axis, is_xyz) for array in (case.image, case.label))
            plot.imshow(overlay(image, np.zeros_like(label)))
            for c in range(1, len(class_names) + 1):
                if (label == c).any():
                    plot.contour(label == c, levels=[0.5], colors=[colours[c - 1]], linewidths=1)
            plot.set_title(f"{case.name}, {PLANE_NAMES[axis] if is_xyz else 'slice'} {k + 1}", fontsize=7)
            plot.set_xticks([])
            plot.set_yticks([])
    handles = [Patch(color=colour, label=name) for colour, name in zip(colours, class_names, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    _save_figure(figure, path)


def save_scan_figure(
    path: Path, case: Case, class_names: Sequence[str], window: tuple[float, float] | None = None
) -> None:
    """Draw a label map over a scan in three planes, each through the slice with most foreground, else the middle.

    Args:
        path: PNG to write; its folder is there.
        case: image and classes (X, Y, Z), axes to the patient's left, front and top: left is shown on the right, as
            radiologists do; its name is the title; with its voxel sides.
        class_names: of the foreground classes.
        window: intensities shown as black and white; None: the slice's own.
    """
    image, label = case.image, case.label
    figure = Figure(figsize=(13, 4.8), dpi=FIGURE_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for plot, axis in zip(figure.subplots(1, 3), (2, 1, 0), strict=True):
        k = fullest_slice(label, axis) if label.any() else image.shape[axis] // 2
        picture, mask = np.take(image, k, axis).T, np.take(label, k, axis).T
        across, up = (case.spacing[a] for a in range(3) if a != axis)
        plot.imshow(overlay(np.clip(picture, *window) if window else picture, mask), origin="lower", aspect=up / across)
        plot.set_title(f"{PLANE_NAMES[axis]} {k + 1} of {image.shape[axis]}", fontsize=9)
        plot.set_xticks([])
        plot.set_yticks([])
    colours = class_colours(np.arange(1, len(class_names) + 1))
    handles = [Patch(color=colour, label=name) for colour, name in zip(colours, class_names, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(case.name if label.any() else f"{case.name}: nothing found", fontsize=10)
    _save_figure(figure, path)


def save_metrics_figure(path: Path, rows: Sequence[CaseRow], metrics: Sequence[str]) -> None:
    """Draw each case's metrics as a point, a column a predictor; each structure has its colour, a bar is the mean."""
    predictors, structures = (list(dict.fromkeys(getattr(r, key) for r in rows)) for key in ("predictor", "structure"))
    figure = Figure(figsize=(2.5 + 0.8 * len(predictors) * len(metrics), 4.5), dpi=FIGURE_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    width, colours = 0.7 / len(structures), class_colours(np.arange(1, len(structures) + 1))
    for plot, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for (i, predictor), (k, structure) in product(enumerate(predictors), enumerate(structures)):
            values = [getattr(r, metric) for r in rows if (r.predictor, r.structure) == (predictor, structure)]
            finite = [value for value in values if not math.isnan(value)]
            place = i + (k - (len(structures) - 1) / 2) * width
            spread = np.linspace(-width / 4, width / 4, len(finite))
            plot.scatter(place + spread, finite, s=9, color=colours[k], alpha=0.7, linewidths=0)
            if finite:
                plot.hlines(np.mean(finite), place - width / 2.5, place + width / 2.5, color="black", linewidth=1.2)
        plot.set_xticks(range(len(predictors)), predictors, rotation=60, ha="right", fontsize=7)
        plot.set_title(METRICS[metric], fontsize=9)
        plot.grid(axis="y", alpha=0.3)
    handles = [Patch(color=colour, label=name) for colour, name in zip(colours, structures, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    _save_figure(figure, path)


def _save_figure(figure: Figure, path: Path) -> None:
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # two $ in a case's name are no formula
    with replacing(path) as temporary:
        figure.savefig(temporary)


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

        rows = evaluate(predictors, cases, task, distances=False, on_case=draw_first)
        dice = {name: 0.0 if math.isnan(value) else value for name, value in mean_dice(rows).items()}
        return Validation(dice, panels[0])

    return validate


def test_report(
    folder: Path,
    predictors: Predictors,
    cases: Sequence[Case],
    task: Task,
    facts: dict[str, Any],
    nifti: bool = False,
) -> None:
    """Score predictors; write cases.csv, summary.json, cases.png and metrics.png; print the tables.

    Each case is kept as soon as it is scored, so that a test that was stopped goes on; cases.csv holds those that are
    done, and summary.json comes when all are.

    Args:
        folder: where to.
        predictors: those that cases.png shows first.
        cases: volumes to score.
        task: see evaluate().
        facts: what else summary.json says, such as the split; "protocol": see summarise().
        nifti: also write nifti/, of the answer.
    """
    shown, method = predictors.pictured, facts.get("method", "sdcl")
    settings = {k: v for k, v in facts.get("config", {}).items() if k not in MACHINE_FIELDS and k != "protocol"}
    made_by = {"predictors": predictors.members, "classes": task.class_names, "values": task.label_values}
    made_by |= {key: facts.get("environment", {}).get(key) for key in ("commit", "packages")}
    kept = ScoredCases(folder / "scored", key_of(predictors.networks, settings | made_by))
    done = {case.name: found for case in cases if (found := kept.load(case)) is not None}
    if done:
        LOGGER.info("going on with a test that was stopped: %d of %d volumes are scored", len(done), len(cases))
    (folder / "summary.json").unlink(missing_ok=True)  # of an earlier test, which cases.csv no longer is of
    LOGGER.info("scoring %d predictors on %d volumes", len(predictors.members), len(cases) - len(done))
    label_maps: dict[str, dict[str, np.ndarray]] = {name: maps for name, (_, maps) in done.items()}
    rows_of: dict[str, list[CaseRow]] = {name: rows for name, (rows, _) in done.items()}

    def keep_maps(case: Case, maps: dict[str, np.ndarray], probabilities: dict[str, np.ndarray]) -> None:
        label_maps[case.name] = {name: maps[name] for name in shown}
        if nifti:
            save_nifti(folder / "nifti", case, maps[shown[-1]], probabilities[shown[-1]], task)

    def keep_rows(case: Case, rows: list[CaseRow]) -> None:
        rows_of[case.name] = rows
        kept.save(case, rows, label_maps[case.name])
        _write_cases(folder, method, [row for case in cases for row in rows_of.get(case.name, ())])

    waiting = [case for case in cases if case.name not in done]
    evaluate(predictors, waiting, task, on_case=keep_maps, on_scored=keep_rows)
    rows = [row for case in cases for row in rows_of[case.name]]
    _write_cases(folder, method, rows)
    protocol: Protocol = facts["protocol"]
    summary = summarise(rows, protocol)
    content = facts | {"summary": [{"method": method} | asdict(row) for row in summary]}
    write_text(folder / "summary.json", json.dumps(_without_nan(content), indent=2, allow_nan=False) + "\n")
    LOGGER.info("method %s\n\n%s\n\n%s", method, format_cases(rows), format_table(summary, protocol))
    dice, by_name = case_dice(rows)[shown[-1]], {case.name: case for case in cases}
    pictures = [
        (f"{rank}: Dice {dice[name]:.3f}", by_name[name], label_maps[name])
        for rank, name in best_median_worst(rows, shown[-1]).items()
    ]
    save_case_figure(folder / "cases.png", pictures, task, predictors)
    save_metrics_figure(folder / "metrics.png", rows, shown_metrics(rows))
    kept.remove()
    LOGGER.info("written to %s: cases.csv, summary.json, cases.png, metrics.png", folder)


def _write_cases(folder: Path, method: str, rows: Sequence[CaseRow]) -> None:
    write_csv(folder / "cases.csv", [{"method": method} | asdict(row) for row in rows])


def save_nifti(
    folder: Path, case: Case, label_map: np.ndarray, probabilities: np.ndarray, task: Task | None = None
) -> None:
    """Write `<case>_{image,label,prediction,probability}.nii.gz`, in the HDF5 file's own order of axes.

    With the case's affine they lie where the scan lay; without it the affine holds the spacing, or 1 where unknown.

    Args:
        folder: where to.
        case: a volume (*S).
        label_map: (*S).
        probabilities: (C, *S); written as (*S, C - 1), the foreground classes, or (*S) for one.
        task: for the label files' own values; None: label maps hold classes.
    """
    affine = np.diag([*(case.spacing or (1.0,) * case.image.ndim), 1.0]) if case.affine is None else case.affine
    foreground = probabilities[1] if len(probabilities) == 2 else np.moveaxis(probabilities[1:], 0, -1)
    label, prediction = (array if task is None else task.original(array) for array in (case.label, label_map))
    for name, array in (
        ("image", case.image), ("label", label), ("prediction", prediction), ("probability", foreground),
    ):  # fmt: skip
        picture = nibabel.Nifti1Image(array, affine)
        picture.header.set_xyzt_units("mm")
        with replacing(folder / f"{case.name}_{name}.nii.gz") as temporary:
            nibabel.save(picture, temporary)


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
