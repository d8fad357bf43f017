"""Segmenting scans one after the other, as code/predict.py's header says: what fails is told, the others are there."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataloaders.scans.channels import PLACE, group
from dataloaders.scans.dicom_output import check_are_series
from dataloaders.scans.finding import SeriesPath, VolumePath, is_scan_file
from dataloaders.scans.joining import by_patterns
from dataloaders.scans.locating import roi_finder
from dataloaders.scans.overlapping import InTurn, Later
from dataloaders.scans.pictures import is_picture
from dataloaders.scans.prediction import Run, inference_of, segmented
from dataloaders.scans.preprocessing import Prepared
from dataloaders.scans.reading import count_volumes, find_scans, name_of
from dataloaders.scans.results import VOLUMES, add_volumes, check_volumes
from dataloaders.scans.segmenting import (
    FindRoi,
    LeftOutError,
    Opened,
    OutputFiles,
    check_outputs,
    decided,
    opened,
    reason_of,
    written,
)
from dataloaders.volumes import check_windows
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER
from sdcl.runs.weights import Loaded


def _size(row: dict[str, Any]) -> str:
    """Return a structure and how large it is, of a picture in pixels."""
    ml, voxels = row["volume_ml"], row["voxels"]
    return f"{row['structure']} {f'{voxels} pixels' if np.isnan(ml) else f'{ml:.3g} ml'}"


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
    if path.is_file() and (not channels or count_volumes(path) == len(channels)):  # a 4D file holds its channels
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


def _scans(config: Any, run: Run) -> tuple[dict[str, tuple[Path, ...]], dict[str, str]]:
    """Return the scans that the header names, as scans_of() does, by --image_pattern and --frames, too.

    Raises:
        UserError: flags contradict each other, or nothing is found.
    """
    channels, incomplete = run.preprocessing.channels, {}
    if config.image_pattern is None:
        scans, incomplete = scans_of(config.input, channels, config.series)
    elif config.input.is_file() or config.series is not None:
        raise UserError("--image_pattern chooses among the files of a folder: leave --series out, and give the folder.")
    else:
        scans = by_patterns(config.input, config.image_pattern, channels if PLACE in config.image_pattern else ())
    if not config.frames:
        return scans, incomplete
    if channels:
        raise UserError("--frames is for runs of one channel: a 4D file of this run holds its channels.")
    frames: dict[str, tuple[Path, ...]] = {}
    for name, (path, *_) in scans.items():
        count = count_volumes(path)
        digits = max(len(str(count)), 2)
        for k in range(count):
            number = f"_frame{k + 1:0{digits}d}" if count > 1 else ""
            frames[f"{name}{number}"] = (VolumePath.of(path, k) if count > 1 else path,)
    return frames, incomplete


def tell_limits(config: Any, run: Run) -> None:
    """Say what of a run makes its predictions doubtful."""
    how = run.preprocessing
    if run.trained_on_crops and config.roi is None:
        LOGGER.info("NOTE: this run was trained on crops around the structure; without --roi expect false findings.")
    if run.voxel_sides is None and run.is_3d:
        LOGGER.info("NOTE: the run has no voxel sides of its training cases, so scans are not checked against them.")
    if how.orientation is None:
        LOGGER.info(
            "NOTE: this run's files kept the axes that they were stored in: a scan of other axes is not turned."
        )
    if how.layout == "slices" and getattr(how, "slice_axis", None) is None:
        LOGGER.info("NOTE: this run fixes no slicing axis: each scan is sliced across its own longest voxel side.")


Load = Callable[[Any, dict[str, Any], tuple[int, int], torch.device], Loaded]


def predict_scans(config: Any, device: torch.device, load: Load) -> None:
    """Read the run, then segment one scan after the other.

    Args:
        config: code/predict.py's header.
        device: where to compute.
        load: gives the networks of a header, a run's settings, the numbers of classes and of channels, and a device,
            and their name.

    Raises:
        UserError: a setting is impossible, or some scans were refused; the others are there.
    """
    if config.output.exists() and not config.output.is_dir():
        raise UserError(f"--output {config.output} is a file: give a folder.")
    if config.pixel_spacing_mm and not all(0 < side < np.inf for side in config.pixel_spacing_mm):
        raise UserError(f"--pixel_spacing_mm {config.pixel_spacing_mm} must be two numbers above 0.")
    run = Run.read(config.run, config.largest_component)
    find_roi = roi_finder(config, device, run.preprocessing.channels)
    if config.stride and run.is_3d:
        check_windows(config.stride, run.settings["patch_size"])
    scans, incomplete = _scans(config, run)
    if config.dicom_seg:
        check_are_series(paths[0] for paths in scans.values())
    check_outputs(config, scans)
    tell_limits(config, run)
    loaded = load(config, run.settings, (run.num_classes, len(run.preprocessing.rules)), device)
    Batch(config, run, loaded, find_roi).predict(scans, incomplete)


class Batch:
    """Segments scans one after the other; the next one is read and the last one written while one is computed.

    No more than one scan is read ahead, and none is written while another one waits to be. Rows and the log's lines
    keep the scans' order, and what one of them raises refuses that one alone.

    Args:
        config: the header.
        run: the trained run.
        loaded: the networks whose probabilities are averaged, and the name that the table calls them by.
        find_roi: gives the box to segment of a scan, or None.
    """

    def __init__(self, config: Any, run: Run, loaded: Loaded, find_roi: FindRoi):
        self._config, self._run, self._loaded, self._find_roi = config, run, loaded, find_roi
        self._table = config.output / VOLUMES
        check_volumes(self._table)  # before anything is computed
        self._rows, self._failures, self._left_out, self._kept = [], [], [], 0
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
        if self._left_out:
            LOGGER.info(
                "left out: %d files that look like label maps (--image_pattern takes them)", len(self._left_out)
            )
            if not self._rows and not self._failures:
                raise UserError(f"{self._config.input} holds label maps only, no scan: give the folder of the scans.")
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
                except LeftOutError as reason:
                    finish = partial(self._leave_out, str(reason))
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
        parts = segmented(prepared, of.scan, infer, self._loaded.networks)
        return of, *decided(parts, of.scan, of.inside, self._run, self._config.save_probability)

    def _in_turn(self, number: int, finish: Callable[[], None]) -> None:
        self._turn.of(number)
        finish()
        self._turn.next()

    def _write(self, of: Opened, label: np.ndarray, foreground: np.ndarray | None) -> None:
        try:
            path = OutputFiles.of(self._config, of.name, of.path).label
            replaces = f"; {path.name} was there and is replaced" * path.exists()
            found = written(self._config, self._run, of, label, foreground)
            self._rows += [row | {"weights": self._loaded.name} for row in found]
            self._kept = add_volumes(self._table, self._rows)
            LOGGER.info("%s: %s%s", of.name, ", ".join(map(_size, found)), replaces)
        except Exception as error:
            self._refuse(of.name, told((of.path,), error))

    def _leave_out(self, said: str) -> None:
        self._left_out.append(said)
        LOGGER.info("LEFT OUT: %s", said)

    def _refuse(self, name: str, said: str) -> None:
        self._failures.append(said)
        LOGGER.info("%s: REFUSED: %s", name, said)


def told(paths: tuple[Path, ...], error: Exception) -> str:
    """Return why a scan is refused, with its path."""
    return f"{'' if isinstance(error, UserError) else f'{paths[0]}: '}{reason_of(error)}"
