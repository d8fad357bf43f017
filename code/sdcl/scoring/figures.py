"""The pictures: cases with their label maps, the doctor's contours, a scan's prediction, metrics as points."""

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

from sdcl.runs.atomic import replacing
from sdcl.scoring.evaluation import Case, CaseRow, Predictors, Task
from sdcl.scoring.tables import METRICS

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
    image, reference = (slice_of(v, k, axis, is_xyz) for v in (case.shown, case.label))
    maps = {name: slice_of(label, k, axis, is_xyz) for name, label in label_maps.items()}
    shown = {
        f"{case.name}, {PLANE_NAMES[axis] if is_xyz else 'slice'} {k + 1}": overlay(image, np.zeros_like(reference)),
        "reference": overlay(image, reference),
    }
    shown |= {name.split(",")[0].replace("_", " "): overlay(image, label) for name, label in maps.items()}
    if len(maps) == 2:
        a, b = maps.values()
        shown[disagreement(label_maps)] = overlay(image, a != b, DISCREPANCY_COLOUR)
    return shown


def disagreement(names: Iterable[str]) -> str:
    """Return what it is called where two predictors differ: of the students, or of others."""
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
    handles += [Patch(color=DISCREPANCY_COLOUR, label=disagreement(single))] * (len(single) == 2)
    named = "mean of the students" if len(predictors.members[answer]) > 1 else answer.split(",")[0].replace("_", " ")
    handles += [
        Line2D([], [], color="grey", label="reference"),
        Line2D([], [], color="lightgrey", linestyle="dashed", label=f"{named} (white)"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    save_figure(figure, path)


def save_label_figure(path: Path, cases: Sequence[Case], class_names: Sequence[str], is_xyz: bool) -> None:
    """Draw labelled volumes with the contours of their labels, a row a case, across three planes or in three slices.

    Args:
        path: PNG to write; its folder is there.
        cases: volumes of three dimensions; of several channels the first is shown.
        class_names: of the foreground classes.
        is_xyz: the axes are x, y, z; else slices, rows, columns, of which three slices are shown.
    """
    colours = class_colours(np.arange(1, len(class_names) + 1))
    figure = Figure(figsize=(10, 3.2 * len(cases) + 0.4), dpi=FIGURE_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, case in zip(figure.subplots(len(cases), 3, squeeze=False), cases, strict=True):
        depth = len(case.label)
        places = [(0, depth * k // 4) for k in (1, 2, 3)]
        places = [(axis, fullest_slice(case.label, axis)) for axis in (2, 1, 0)] if is_xyz else places
        for plot, (axis, k) in zip(axes, places, strict=True):
            image, label = (slice_of(array, k, axis, is_xyz) for array in (case.shown, case.label))
            plot.imshow(overlay(image, np.zeros_like(label)))
            for c in range(1, len(class_names) + 1):
                if (label == c).any():
                    plot.contour(label == c, levels=[0.5], colors=[colours[c - 1]], linewidths=1)
            plot.set_title(f"{case.name}, {PLANE_NAMES[axis] if is_xyz else 'slice'} {k + 1}", fontsize=7)
            plot.set_xticks([])
            plot.set_yticks([])
    handles = [Patch(color=colour, label=name) for colour, name in zip(colours, class_names, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    save_figure(figure, path)


def save_scan_figure(
    path: Path, case: Case, class_names: Sequence[str], window: tuple[float, float] | None = None
) -> None:
    """Draw a label map over a scan in three planes, each through the slice with most foreground, else the middle.

    A scan of one slice is drawn in its own plane alone.

    Args:
        path: PNG to write; its folder is there.
        case: image and classes (X, Y, Z), axes to the patient's left, front and top: left is shown on the right, as
            radiologists do; its name is the title; with its voxel sides.
        class_names: of the foreground classes.
        window: intensities shown as black and white; None: the slice's own.
    """
    image, label = case.shown, case.label
    planes = [axis for axis in (2, 1, 0) if image.shape[axis] == 1]
    planes = planes if len(planes) == 1 else [2, 1, 0]  # across a single slice there is nothing to see
    figure = Figure(figsize=(13 if len(planes) == 3 else 5, 4.8), dpi=FIGURE_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for plot, axis in zip(figure.subplots(1, len(planes), squeeze=False)[0], planes, strict=True):
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
    save_figure(figure, path)


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
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, whole or not at all; texts are no formulas."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # two $ in a case's name are no formula
    with replacing(path) as temporary, without_glyph_warnings():
        figure.savefig(temporary)


@contextlib.contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Keep matplotlib's warnings of letters that its font lacks, which it draws as boxes, from the terminal."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph ")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")  # some scripts
        yield
