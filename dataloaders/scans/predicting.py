"""Segmenting scans one after the other, as code/predict.py's header says: what fails is told, the others are there."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dataloaders.scans.channels import FIRST, group, read_channels
from dataloaders.scans.dicom_output import check_are_series, read_sources, save_segmentation
from dataloaders.scans.finding import SeriesPath, is_scan_file
from dataloaders.scans.locating import roi_finder
from dataloaders.scans.overlapping import InTurn, Later
from dataloaders.scans.pictures import is_picture, save_mask
from dataloaders.scans.prediction import Placed, Run, box_on_grid, inference_of, prepared_for, segmented
from dataloaders.scans.preprocessing import WINDOW_HU, Box, Prepared
from dataloaders.scans.reading import Scan, find_scans, name_of
from dataloaders.scans.results import is_sheared, nifti_like, read_volumes, save_nifti_file, upright, write_volumes
from dataloaders.volumes import check_windows
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER
from sdcl.scoring.evaluation import Case
from sdcl.scoring.figures import class_colours, save_scan_figure

FindRoi = Callable[[Sequence[Scan]], Box | None]


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
    """
    path, how = paths[0], run.preprocessing
    if is_picture(path) and (run.is_3d or how.spacing_mm is not None):
        raise UserError(f"{path} is a picture without mm, and this run was trained on scans: give those.")
    channels = read_channels(paths, config.pixel_spacing_mm)
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
    return Opened(name, path, scan, inside, sources), prepared_for(channels, how, roi, config.trust_hu)


def written(config: Any, run: Run, of: Opened, label: np.ndarray, foreground: np.ndarray | None) -> list[dict]:
    """Write a scan's label map, and what else is asked for; return its structures' volumes."""
    stem = of.name.removesuffix(FIRST) if config.nnunet_names else f"{of.name}_prediction"
    if is_picture(of.path):
        _save_mask(config.output / f"{stem}.png", run, label)
    else:
        save_nifti_file(nifti_like(of.scan, run.in_label_values(label)), config.output / f"{stem}.nii.gz")
    if foreground is not None:
        save_nifti_file(nifti_like(of.scan, foreground), config.output / f"{of.name}_probability.nii.gz")
    if config.save_figure:
        is_taken = is_picture(of.path) and stem == of.name
        save_figure(config.output / f"{of.name}{'_figure' * is_taken}.png", run, of.name, of.scan, label)
    if of.sources is not None:
        save_segmentation(config.output / f"{stem}.dcm", of.scan, label, of.sources, run)
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


def _size(row: dict[str, Any]) -> str:
    """Return a structure and how large it is, of a picture in pixels."""
    ml, voxels = row["volume_ml"], row["voxels"]
    return f"{row['structure']} {f'{voxels} pixels' if np.isnan(ml) else f'{ml:.3g} ml'}"


def reason_of(error: Exception) -> str:
    """Return an error as one sentence."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return "the memory is full: give --roi, or a smaller --window_batch or --batch_size."
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no reason given'}"


def scans_of(
    path: Path, channels: Sequence[str], series: str | None = None
) -> tuple[dict[str, tuple[Path, ...]], dict[str, str]]:
    """Return the scans to predict by name, a file a channel, and what is the matter with those that lack a channel.

    Of one series, however deep it lies, the name of the folder given counts; of several channels a file stands for the
    others of its case, beside it, and a folder's files may be called as the channels are.
    """
    incomplete: dict[str, str] = {}
    if not path.exists():
        raise UserError(f"--input {path} does not exist: check the path.")
    if path.is_file() and series is not None:
        raise UserError(f"--series chooses among the DICOM series of a folder, and --input {path} is a file.")
    if path.is_file() and not channels:
        return {name_of(path): (path,)}, {}
    if path.is_file():
        kind = is_picture if is_picture(path) else is_scan_file
        beside = {name_of(other): other for other in sorted(path.parent.iterdir()) if kind(other)}
        cases = group(beside, channels, incomplete)
        name = next((name for name, paths in cases.items() if path in paths), None)
        if name is None:
            own = next((said for case, said in incomplete.items() if name_of(path).startswith(case)), None)
            raise UserError(own or f"--input {path} is no channel of a case, its name ends otherwise: give the folder.")
        return {name: cases[name]}, {}
    scans = find_scans(path, series)
    only = next(iter(scans.values()))
    is_series = len(scans) == 1 and isinstance(only, SeriesPath)
    if channels and set(channels) <= set(scans):
        return {path.resolve().name: tuple(scans[channel] for channel in channels)}, {}
    return group({path.resolve().name: only} if is_series else scans, channels, incomplete), incomplete


def tell_limits(config: Any, run: Run) -> None:
    """Say what of a run makes its predictions doubtful."""
    how = run.preprocessing
    if run.trained_on_crops and config.roi is None:
        LOGGER.info("NOTE: this run was trained on crops around the structure; without --roi expect false findings.")
    if how.orientation is None:
        LOGGER.info(
            "NOTE: this run's files kept the axes that they were stored in: a scan of other axes is not turned."
        )
    if how.layout == "slices" and getattr(how, "slice_axis", None) is None:
        LOGGER.info("NOTE: this run fixes no slicing axis: each scan is sliced across its own longest voxel side.")


Load = Callable[[Any, dict[str, Any], tuple[int, int], torch.device], list[nn.Module]]


def predict_scans(config: Any, device: torch.device, load: Load) -> None:
    """Read the run, then segment one scan after the other.

    Args:
        config: code/predict.py's header.
        device: where to compute.
        load: gives the networks of a header, a run's settings, the numbers of classes and of channels, and a device.

    Raises:
        UserError: a setting is impossible, or some scans were refused; the others are there.
    """
    if config.pixel_spacing_mm and not all(0 < side < np.inf for side in config.pixel_spacing_mm):
        raise UserError(f"--pixel_spacing_mm {config.pixel_spacing_mm} must be two numbers above 0.")
    run = Run.read(config.run, config.largest_component)
    find_roi = roi_finder(config, device, run.preprocessing.channels)
    if config.stride and run.is_3d:
        check_windows(config.stride, run.settings["patch_size"])
    scans, incomplete = scans_of(config.input, run.preprocessing.channels, config.series)
    if config.dicom_seg:
        check_are_series(paths[0] for paths in scans.values())
    tell_limits(config, run)
    networks = load(config, run.settings, (run.num_classes, len(run.preprocessing.rules)), device)
    Batch(config, run, networks, find_roi).predict(scans, incomplete)


class Batch:
    """Segments scans one after the other; the next one is read and the last one written while one is computed.

    No more than one scan is read ahead, and none is written while another one waits to be. Rows and the log's lines
    keep the scans' order, and what one of them raises refuses that one alone.

    Args:
        config: the header.
        run: the trained run.
        networks: whose probabilities are averaged.
        find_roi: gives the box to segment of a scan, or None.
    """

    def __init__(self, config: Any, run: Run, networks: list[nn.Module], find_roi: FindRoi):
        self._config, self._run, self._networks, self._find_roi = config, run, networks, find_roi
        self._table = config.output / "volumes.csv"
        self._earlier, self._rows, self._failures, self._kept = read_volumes(self._table), [], [], 0
        self._turn = InTurn()

    def predict(self, scans: Mapping[str, tuple[Path, ...]], incomplete: Mapping[str, str]) -> None:
        """Segment scans, a file a channel each, and say what is the matter with the incomplete ones.

        Raises:
            UserError: some were refused; the others are there.
        """
        for name, said in incomplete.items():
            self._refuse(name, said)
        with self._turn:
            self._predict_all(list(scans.items()))
        if self._rows:
            stay = f"; {self._kept} rows of other scans stay in {self._table.name}" * bool(self._kept)
            LOGGER.info("written to %s%s", self._config.output, stay)
        if self._failures:
            count = len(scans) + len(incomplete)
            raise UserError(f"{len(self._failures)} of {count} scans were refused, the first: {self._failures[0]}")

    def _predict_all(self, scans: list[tuple[str, tuple[Path, ...]]]) -> None:
        waiting = [Later(self._open, k, *scans[k]) for k in range(len(scans[:1]))]
        writing = Later(lambda: None)
        try:
            for number, (name, paths) in enumerate(scans):
                self._turn.of(number)
                try:
                    finish = partial(self._write, *self._segment(scans, number, waiting))
                except Exception as error:  # whatever a library raises, the other scans are predicted
                    finish = partial(self._refuse, name, told(paths, error))
                writing.result()
                writing = Later(self._in_turn, number, finish)
                del finish  # it holds a whole scan
        finally:
            writing.result()  # after Ctrl-C, too: what is being written is finished

    def _open(self, number: int, name: str, paths: tuple[Path, ...]) -> tuple[Opened, Prepared]:
        self._turn.of(number)
        return opened(self._config, self._run, name, paths, self._find_roi)

    def _segment(
        self, scans: list[tuple[str, tuple[Path, ...]]], number: int, waiting: list[Later]
    ) -> tuple[Opened, np.ndarray, np.ndarray | None]:
        """Wait for the scan that is being read, begin to read the next one, and decide this one's labels."""
        try:
            of, prepared = waiting.pop().result()
        finally:
            if number + 1 < len(scans):
                waiting.append(Later(self._open, number + 1, *scans[number + 1]))
        infer = inference_of(self._run, self._config, of.name)
        parts = segmented(prepared, of.scan, infer, self._networks)
        return of, *decided(parts, of.scan, of.inside, self._run, self._config.save_probability)

    def _in_turn(self, number: int, finish: Callable[[], None]) -> None:
        self._turn.of(number)
        finish()
        self._turn.next()

    def _write(self, of: Opened, label: np.ndarray, foreground: np.ndarray | None) -> None:
        try:
            found = written(self._config, self._run, of, label, foreground)
            self._rows += found
            self._kept = write_volumes(self._table, self._earlier, self._rows)
            LOGGER.info("%s: %s", of.name, ", ".join(map(_size, found)))
        except Exception as error:
            self._refuse(of.name, told((of.path,), error))

    def _refuse(self, name: str, said: str) -> None:
        self._failures.append(said)
        LOGGER.info("%s: REFUSED: %s", name, said)


def told(paths: tuple[Path, ...], error: Exception) -> str:
    """Return why a scan is refused, with its path."""
    return f"{'' if isinstance(error, UserError) else f'{paths[0]}: '}{reason_of(error)}"
