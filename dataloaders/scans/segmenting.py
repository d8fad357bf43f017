"""One scan's way through a prediction: read and prepared, decided part by part, written."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.scans.channels import FIRST, read_channels
from dataloaders.scans.dicom_output import read_sources, save_segmentation
from dataloaders.scans.pictures import is_picture, save_mask
from dataloaders.scans.prediction import Placed, Run, box_on_grid, prepared_for, tell_unlike_sides
from dataloaders.scans.preprocessing import WINDOW_HU, Box, Prepared
from dataloaders.scans.reading import ConstantImageError, Scan, few_whole_numbers
from dataloaders.scans.results import is_sheared, nifti_like, save_nifti_file, upright
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER
from sdcl.runs.written_files import check_replaceable
from sdcl.scoring.evaluation import Case
from sdcl.scoring.figures import class_colours, save_scan_figure

FindRoi = Callable[[Sequence[Scan]], Box | None]


class LeftOutError(Exception):
    """A file among the scans is a label map, and is left out."""


@dataclass(frozen=True)
class Opened:
    """A scan that is read, and what its writing needs.

    Attributes:
        name: of the scan.
        path: of its first channel.
        scan: gives the grid, and the figure's picture.
        inside: where the scan was, (X, Y, Z), of one that was resampled; None: everywhere.
        sources: of a DICOM series, what a DICOM SEG refers to.
    """

    name: str
    path: Path
    scan: Scan
    inside: np.ndarray | None
    sources: Any


def opened(config: Any, run: Run, name: str, paths: tuple[Path, ...], find_roi: FindRoi) -> tuple[Opened, Prepared]:
    """Read one scan and bring it onto the networks' grid.

    Args:
        config: the header.
        run: the trained run.
        name: of the scan.
        paths: of the scan, of each channel.
        find_roi: gives the box to segment, or None for the whole scan.

    Raises:
        LeftOutError: a file that was found in a folder looks like a label map.
        UserError: the scan cannot be read, or does not suit the run.
    """
    path, how = paths[0], run.preprocessing
    if is_picture(path) and (run.is_3d or how.spacing_mm is not None):
        raise UserError(f"{path} is a picture without mm, and this run was trained on scans: give those.")
    is_named = config.input.is_file() or config.image_pattern is not None  # then it is what the user wants
    try:
        channels = read_channels(paths, config.pixel_spacing_mm, len(how.rules))
    except ConstantImageError as error:
        if is_named or error.value != 0:
            raise
        raise LeftOutError(f"{path} holds the value 0 only, like a label map without foreground") from None
    if (values := few_whole_numbers(channels[0].array)) and len(paths) == 1:
        said = f"{path} holds only the numbers {', '.join(map(str, values))}, like a label map"
        if not is_named:
            raise LeftOutError(f"{said}; --image_pattern says which files are scans")
        LOGGER.info("NOTE: %s", said)
    if len(paths) == 1 < len(channels) and len(how.rules) == 1 and not is_picture(path):
        raise UserError(f"{path} holds {len(channels)} volumes, and this run takes one: give --frames to predict each.")
    original = scan = channels[0]
    sources = read_sources(scan) if config.dicom_seg else None
    roi, inside = find_roi(channels), None
    if is_sheared(scan) and scan.header is None:
        turned = [upright(channel) for channel in channels]
        channels = [channel for channel, _ in turned]
        scan, inside = turned[0]
        roi = box_on_grid(roi, original, scan.affine, scan.array.shape) if roi else None
        shapes = ["×".join(map(str, s.array.shape)) for s in (original, scan)]
        LOGGER.info(
            "NOTE: %s: its slices are tilted against their line, which not every program can read; it is resampled "
            "onto an upright grid, %s to %s voxels, which the prediction has", path, *shapes
        )  # fmt: skip
    elif is_sheared(scan):
        LOGGER.info("NOTE: %s: its axes are sheared; the prediction's are, too (qform code 0)", path)
    prepared = prepared_for(channels, how, roi, config.trust_hu)
    tell_unlike_sides(run, path, prepared)
    return Opened(name, path, scan, inside, sources), prepared


@dataclass(frozen=True)
class OutputFiles:
    """The files that the prediction of one scan writes; None for those that are not asked for.

    Attributes:
        label: the label map.
        probability: the foreground's probabilities.
        figure: the prediction over the scan.
        dicom_seg: the DICOM segmentation.
    """

    label: Path
    probability: Path | None
    figure: Path | None
    dicom_seg: Path | None

    @classmethod
    def of(cls, config: Any, name: str, path: Path) -> "OutputFiles":
        """Name the files of a scan, as code/predict.py's header asks for them."""
        folder = config.output
        stem = name.removesuffix(FIRST) if config.nnunet_names else f"{name}_prediction"
        return cls(
            label=folder / f"{stem}{'.png' if is_picture(path) else '.nii.gz'}",
            probability=folder / f"{name}_probability.nii.gz" if config.save_probability else None,
            figure=folder / f"{name}_figure.png" if config.save_figure else None,
            dicom_seg=folder / f"{stem}.dcm" if config.dicom_seg else None,
        )

    def paths(self) -> list[Path]:
        """List the files."""
        return [path for path in dataclasses.astuple(self) if path is not None]


def check_outputs(config: Any, scans: Mapping[str, Sequence[Path]]) -> None:
    """Check, before anything is computed, that no prediction replaces a file of the user's or another prediction.

    Args:
        config: code/predict.py's header.
        scans: the files of each scan, one per channel, by name.

    Raises:
        UserError: a file to write is there and not ours, or two scans would write the same file.
    """
    writer_of: dict[Path, str] = {}
    for name, paths in scans.items():
        files = OutputFiles.of(config, name, paths[0]).paths()
        check_replaceable(*files)
        for file in files:
            if (other := writer_of.setdefault(file, name)) != name:
                raise UserError(f"{other} and {name} would both be written to {file}: rename one of the scans.")


def written(config: Any, run: Run, of: Opened, label: np.ndarray, foreground: np.ndarray | None) -> list[dict]:
    """Write a scan's label map, and what else is asked for; return its structures' volumes."""
    files = OutputFiles.of(config, of.name, of.path)
    if is_picture(of.path):
        _save_mask(files.label, run, label)
    else:
        save_nifti_file(nifti_like(of.scan, run.in_label_values(label)), files.label)
    if foreground is not None:
        save_nifti_file(nifti_like(of.scan, foreground), files.probability)
    if files.figure is not None:
        save_figure(files.figure, run, of.name, of.scan, label)
    if files.dicom_seg is not None:
        save_segmentation(files.dicom_seg, of.scan, label, of.sources, run)
    ml = np.nan if is_picture(of.path) else abs(np.linalg.det(of.scan.affine[:3, :3])) / 1000
    counts = {structure: int((label == c).sum()) for c, structure in enumerate(run.class_names, start=1)}
    return [{"scan": of.name, "structure": s, "volume_ml": float(n * ml), "voxels": n} for s, n in counts.items()]


def decided(
    parts: Iterable[Placed], scan: Scan, inside: np.ndarray | None, run: Run, keeps: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Decide a scan's labels part by part, so that no whole scan's probabilities are in memory unasked.

    Args:
        parts: from segmented().
        scan: gives the grid.
        inside: where the scan was, (X, Y, Z), of one that was resampled; None: everywhere.
        run: for its decision.
        keeps: the probabilities are asked for.

    Returns:
        The labels (X, Y, Z), and, where asked for, the foreground's probabilities (X, Y, Z), or (X, Y, Z, C - 1).
    """
    label: np.ndarray | None = None
    foreground = np.zeros((run.num_classes - 1, *scan.array.shape), np.float32) if keeps else None
    for where, probabilities in parts:
        if inside is not None:
            probabilities *= inside[where]
            probabilities[0][~inside[where]] = 1
        labels = run.decision.labels(probabilities)
        label = np.zeros(scan.array.shape, labels.dtype) if label is None else label
        label[where] = labels
        if keeps:
            foreground[(slice(None), *where)] = probabilities[1:]
    if keeps:
        foreground = foreground[0] if run.num_classes == 2 else np.moveaxis(foreground, 0, -1)
    return run.decision.cleaned(label), foreground


def _save_mask(path: Path, run: Run, label: np.ndarray) -> None:
    """Write a picture's label map, with the label files' numbers and the classes' colours."""
    highest = max(run.label_values, default=0)
    colours = np.zeros((highest + 1, 3), int)
    colours[list(run.label_values)] = np.rint(255 * class_colours(np.arange(1, run.num_classes)))
    save_mask(path, run.in_label_values(label), colours.tolist())


def save_figure(path: Path, run: Run, name: str, scan: Scan, label: np.ndarray) -> None:
    """Draw a prediction over its scan; what the drawing library raises loses the figure alone."""
    turned, shown = scan.oriented("LAS"), Scan(scan.path, label, scan.affine).oriented("LAS").array
    window = WINDOW_HU if run.preprocessing.rules[0] == "ct" else None
    try:
        save_scan_figure(path, Case(name, turned.array, shown, turned.spacing_mm), run.class_names, window)
    except Exception as error:
        LOGGER.info("NOTE: %s could not be drawn (%s)", path, reason_of(error))


def reason_of(error: Exception) -> str:
    """Return an error as one sentence."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return "the memory is full: give --roi, or a smaller --window_batch or --batch_size."
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no reason given'}"
