"""A trained run as something that segments scans: preprocessing, networks, and the way back onto the scan's grid."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from torch import nn

from dataloaders.scans.preprocessing import Box, Prepared, Preprocessing, prepare_channels, resampled
from dataloaders.scans.reading import Scan
from sdcl.inference import Slabs, Windows, slice_slabs, window_slabs, window_starts
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER, read_config, read_task
from sdcl.scoring.evaluation import Decision, Infer

MANY_WINDOWS = 500
PLANES = 32  # of a scan that are decided at a time


@dataclass(frozen=True)
class Run:
    """What a run's config.json says that prediction needs.

    Attributes:
        folder: of the run.
        settings: of its header.
        class_names: of the foreground classes.
        decision: how probabilities become labels.
        preprocessing: what its training files went through.
        trained_on_crops: they were cropped around the label, which a new scan does not have.
        label_values: what the label files called the foreground classes, and predictions call them.
    """

    folder: Path
    settings: dict[str, Any]
    class_names: tuple[str, ...]
    decision: Decision
    preprocessing: Preprocessing
    trained_on_crops: bool
    label_values: tuple[int, ...]

    @classmethod
    def read(cls, folder: Path, largest_component: bool) -> "Run":
        """Read a run's folder.

        Raises:
            UserError: it is none, or lacks what prediction needs.
        """
        settings, task = read_config(folder), read_task(folder)
        try:
            how = Preprocessing.from_dict(task["preprocessing"])
            decision = Decision(task["decision_rule"], 26 if largest_component else None)
            names = tuple(task["class_names"])
            values = _label_values(task.get("label_values"), len(names))
            return cls(folder, settings, names, decision, how, bool(task["trained_on_crops"]), values)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / 'config.json'} lacks what prediction needs ({error}): restore it.") from None

    @property
    def num_classes(self) -> int:
        """Count the classes, background included."""
        return len(self.class_names) + 1

    def in_label_values(self, classes: np.ndarray) -> np.ndarray:
        """Return a map of classes as the label files number them: uint8, or uint16 or int32 where a number needs it."""
        largest = max(self.label_values, default=0)
        dtype = np.uint8 if largest < 2**8 else np.uint16 if largest < 2**16 else np.int32
        return np.array([0, *self.label_values], dtype)[classes]

    @property
    def is_3d(self) -> bool:
        """Tell whether the networks take volumes."""
        return self.preprocessing.layout == "volume"


def _label_values(values: Any, count: int) -> tuple[int, ...]:
    """Check the label values of a config.json; runs that have none were trained on 1, 2, ...

    Raises:
        ValueError: they are not `count` different numbers above 0.
    """
    values = tuple(range(1, count + 1)) if values is None else tuple(values)
    is_sound = all(type(value) is int and 0 < value < 2**31 for value in values)
    if not is_sound or len(set(values)) != len(values) or len(values) != count:
        raise ValueError(f"label_values {list(values)} are not {count} different numbers")
    return values


def inference_of(run: Run, config: Any) -> Infer:
    """Return what maps networks and a prepared volume to their probabilities, slab by slab; see code/predict.py."""
    size = run.settings["patch_size"]
    if not run.is_3d:
        return lambda networks, volume: slice_slabs(
            networks, volume, size, run.num_classes, config.batch_size, config.precision
        )
    stride = config.stride or [max(side // 2, 1) for side in size]

    windows = Windows(
        size, stride, run.num_classes, config.window_batch, config.precision, config.window_weighting, config.tta
    )

    def infer(networks: Sequence[nn.Module], volume: np.ndarray) -> Slabs:
        sides = zip(np.maximum(volume.shape[-3:], size).tolist(), size, stride, strict=True)
        count = math.prod(len(window_starts(*side)) for side in sides)
        if count > MANY_WINDOWS:
            LOGGER.info("%d windows: --roi or a larger --stride makes them fewer", count)
        return window_slabs(networks, volume, windows)

    return infer


def found_in(
    channels: Sequence[Scan],
    how: Preprocessing,
    infer: Infer,
    networks: Sequence[nn.Module],
    roi: Box | None = None,
    trust_hu: bool = False,
) -> Prepared:
    """Predict a scan on the networks' own grid.

    Args:
        channels: of an image, on one grid.
        how: what the networks' training files went through.
        infer: maps networks and a prepared volume (*S), or (channels, *S), to slabs of each network's probabilities.
        networks: their probabilities are averaged.
        roi: only this box of the scan, in its own voxels, (first, end) of each axis.
        trust_hu: take any values of a CT for HU.

    Returns:
        The mean probabilities, float32 (C, *S), and where their grid lies.
    """
    prepared = prepare_channels(channels, how, trust_hu)
    if roi is not None:
        prepared = prepared.cropped(box_on_grid(roi, channels[0], prepared.affine, prepared.shape))
    mean = None
    for where, outputs in infer(networks, prepared.array):
        found = outputs[0] if len(outputs) == 1 else np.mean(outputs, axis=0)
        if mean is None:
            mean = np.empty((len(found), *prepared.shape), np.float32)
        mean[:, where] = found
    return Prepared(mean, prepared.affine)


def planes_on_scan(found: Prepared, scan: Scan) -> Iterator[tuple[slice, np.ndarray]]:
    """Bring probabilities back onto a scan's own grid, some planes at a time; beyond theirs is background.

    Args:
        found: from found_in().
        scan: gives shape (X, Y, Z) and geometry.

    Yields:
        A slice of the scan's first axis, and the probabilities there, float32 (C, planes, Y, Z).
    """
    ones, sides = np.ones(found.shape, np.uint8), scan.array.shape
    for first in range(0, sides[0], PLANES):
        planes = slice(first, min(first + PLANES, sides[0]))
        there = scan.affine @ nibabel.affines.from_matvec(np.eye(3), (first, 0, 0))
        grid = (found.affine, (planes.stop - first, *sides[1:]), there)
        # An outermost voxel counts to its own border, undiminished.
        inside = resampled(ones, *grid, order=0, mode="grid-constant")
        placed = np.stack([resampled(channel, *grid, order=1) * inside for channel in found.array])
        placed[0] += 1 - placed.sum(axis=0)
        yield planes, placed


def box_on_grid(roi: Box, scan: Scan, affine: np.ndarray, shape: Sequence[int]) -> Box:
    """Return the smallest box of another grid that holds a scan's box of voxels."""
    corners = np.stack(np.meshgrid(*[(a - 0.5, b - 0.5) for a, b in roi], indexing="ij"), -1).reshape(-1, 3)
    there = nibabel.affines.apply_affine(np.linalg.inv(affine) @ scan.affine, corners)
    low = np.floor(there.min(axis=0) + 0.5 + 1e-6).astype(int)
    high = np.ceil(there.max(axis=0) + 0.5 - 1e-6).astype(int)
    return tuple((max(int(a), 0), min(int(b), n)) for a, b, n in zip(low, high, shape, strict=True))


def check_roi(roi: Sequence[int], scan: Scan) -> Box:
    """Turn `--roi x0 x1 y0 y1 z0 z1` into a box.

    Raises:
        UserError: it does not lie in the scan.
    """
    box = tuple((roi[k], roi[k + 1]) for k in (0, 2, 4))
    if any(not 0 <= first < end <= side for (first, end), side in zip(box, scan.array.shape, strict=True)):
        raise UserError(
            f"--roi {' '.join(map(str, roi))} does not lie in {scan.path}, of {scan.array.shape} voxels: "
            "give first and end (excluded) voxel of x, y and z, counted from 0."
        )
    return box
