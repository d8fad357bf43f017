"""What a person looks at: the panel that TensorBoard shows, a test's figure and its files."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from sdcl.evaluation import (
    PREDICTORS,
    STUDENTS,
    Case,
    CaseRow,
    Infer,
    Predictors,
    Protocol,
    evaluate,
    format_cases,
    format_table,
    mean_dice,
    summarise,
)
from sdcl.runs import LOGGER, write_csv, write_text

# Okabe and Ito's colour-blind-safe colours, by class; background shows the image.
CLASS_COLOURS = np.array([(0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178)]) / 255
DISCREPANCY_COLOUR = np.array((213, 94, 0)) / 255
OVERLAY = 0.55  # opacity of labels over the image
FIGURE_DPI = 120


def fullest_slice(label: np.ndarray) -> int:
    """Return the index, along the first axis, of the slice (of a volume's label) with most foreground."""
    return int(np.count_nonzero(label.reshape(len(label), -1), axis=1).argmax())


def overlay(image: np.ndarray, label: np.ndarray, colours: np.ndarray = CLASS_COLOURS) -> np.ndarray:
    """Paint a label map over a slice.

    Args:
        image: (H, W), any range.
        label: (H, W), classes; 0 is left unpainted.
        colours: (n, 3) in [0, 1], indexed by the class modulo n - 1, from 1.

    Returns:
        RGB (H, W, 3) in [0, 1].
    """
    low, high = np.percentile(image, (1, 99))
    grey = np.clip((image - low) / max(high - low, 1e-8), 0, 1)[..., None].repeat(3, axis=-1)
    painted = (label > 0)[..., None]
    colour = colours[(label.astype(int) - 1) % (len(colours) - 1) + 1]
    return np.where(painted, (1 - OVERLAY) * grey + OVERLAY * colour, grey)


def views(case: Case, label_maps: Mapping[str, np.ndarray], students: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the five pictures of one case's fullest slice, RGB (H, W, 3) in [0, 1], by title.

    Args:
        case: a volume (D, H, W).
        label_maps: predictor to label map (D, H, W).
        students: names of the two predictors to show and compare.
    """
    k = fullest_slice(case.label)
    image, (a, b) = case.image[k], (label_maps[name][k] for name in students)
    pair = np.stack([np.zeros(3), DISCREPANCY_COLOUR])
    return {
        f"{case.name}, slice {k}": overlay(image, np.zeros_like(a)),
        "reference": overlay(image, case.label[k]),
        "student a": overlay(image, a),
        "student b": overlay(image, b),
        "students disagree": overlay(image, (a != b).astype(int), pair),
    }


def panel(case: Case, label_maps: Mapping[str, np.ndarray], students: Sequence[str]) -> np.ndarray:
    """Return the views of a case side by side, (3, H, 5 W) in [0, 1]."""
    return np.concatenate(list(views(case, label_maps, students).values()), axis=1).transpose(2, 0, 1)


def save_case_figure(
    path: Path, cases: Sequence[tuple[str, Case, Mapping[str, np.ndarray]]], students: Sequence[str],
    class_names: Sequence[str],
) -> None:  # fmt: skip
    """Draw a row of views for each case.

    Args:
        path: PNG to write.
        cases: title, volume and label maps of each row.
        students: see views().
        class_names: of the foreground classes, for the legend.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(13, 2.9 * len(cases) + 0.5), dpi=FIGURE_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(cases), 5, squeeze=False)
    for row, (title, case, label_maps) in zip(axes, cases, strict=True):
        for axis, (name, picture) in zip(row, views(case, label_maps, students).items(), strict=True):
            axis.imshow(picture)
            axis.set_title(name, fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(title, fontsize=9)
    handles = [Patch(color=CLASS_COLOURS[c], label=name) for c, name in enumerate(class_names, start=1)]
    handles.append(Patch(color=DISCREPANCY_COLOUR, label="students disagree"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    temporary = path.with_name("~" + path.name)
    figure.savefig(temporary)
    temporary.replace(path)


@dataclass(frozen=True)
class Validation:
    """One validation: the mean Dice of each predictor, in [0, 1], and a picture (3, H, W) in [0, 1]."""

    dice: dict[str, float]
    panel: np.ndarray


def validator(
    cases: Sequence[Case], infer: Infer, class_names: Sequence[str]
) -> Callable[[list[nn.Module]], Validation]:
    """Return what the loops call to score both students and their mean; the panel shows the first case.

    Args:
        cases: volumes to score.
        infer: see evaluate().
        class_names: of the foreground classes.
    """

    def validate(students: list[nn.Module]) -> Validation:
        panels = []

        def draw_first(case: Case, label_maps: dict[str, np.ndarray]) -> None:
            if not panels:
                panels.append(panel(case, label_maps, STUDENTS))

        predictors = Predictors(students, PREDICTORS)
        rows = evaluate(predictors, cases, infer, class_names, distances=False, on_case=draw_first)
        return Validation(mean_dice(rows), panels[0])

    return validate


def write_test(
    folder: Path,
    predictors: Predictors,
    cases: Sequence[Case],
    infer: Infer,
    class_names: Sequence[str],
    protocol: Protocol,
    facts: dict[str, Any],
) -> None:
    """Score predictors; print the tables; write cases.csv, summary.json and cases.png.

    Args:
        folder: where to.
        predictors: student a, student b and their mean first; these are the ones that cases.png shows.
        cases: volumes to score.
        infer: see evaluate().
        class_names: of the foreground classes.
        protocol: see summarise().
        facts: what else summary.json says, such as the split.
    """
    LOGGER.info("scoring %d predictors on %d volumes", len(predictors.members), len(cases))
    seen: dict[str, tuple[Case, dict[str, np.ndarray]]] = {}
    rows = evaluate(
        predictors, cases, infer, class_names, on_case=lambda case, maps: seen.update({case.name: (case, maps)})
    )
    summary = summarise(rows, protocol)
    LOGGER.info("%s\n\n%s", format_cases(rows), format_table(summary, protocol))
    write_csv(folder / "cases.csv", [asdict(row) for row in rows])
    content = facts | {"protocol": protocol, "summary": [asdict(row) for row in summary]}
    write_text(folder / "summary.json", json.dumps(_without_nan(content), indent=2, allow_nan=False) + "\n")
    *students, mean = list(predictors.members)[:3]
    pictures = [(rank, *seen[name]) for rank, name in best_median_worst(rows, mean).items()]
    save_case_figure(folder / "cases.png", pictures, students, class_names)
    LOGGER.info("written to %s: cases.csv, summary.json, cases.png", folder)


def _without_nan(value: Any) -> Any:
    """Replace nan, which JSON does not know, by None."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def best_median_worst(rows: Sequence[CaseRow], predictor: str) -> dict[str, str]:
    """Return "best", "median" and "worst" to the case of that rank by a predictor's mean Dice over the structures."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        if row.predictor == predictor:
            scores.setdefault(row.case, []).append(0.0 if math.isnan(row.dice) else row.dice)
    ranked = sorted(scores, key=lambda case: -float(np.mean(scores[case])))
    return {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
