"""A trained run as something that segments scans: preprocessing, networks, and the way back onto the scan's grid."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from torch import nn
from tqdm import tqdm

from dataloaders.scans.pictures import is_picture
from dataloaders.scans.preprocessing import Box, Prepared, Preprocessing, prepare_channels, resampled
from dataloaders.scans.reading import Scan
from dataloaders.voxel_sides import SideRange, seen_sides
from sdcl.inference import Slabs, Windows, mean_of, put_together, slice_slabs, window_slabs, window_starts
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER, read_config, read_task
from sdcl.scoring.evaluation import Decision, Infer

Placed = tuple[tuple[slice, ...], np.ndarray]  # where in a scan, and the probabilities (C, *part) there
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
        voxel_sides: of the training cases, as the networks see them; None: not known.
    """

    folder: Path
    settings: dict[str, Any]
    class_names: tuple[str, ...]
    decision: Decision
    preprocessing: Preprocessing
    trained_on_crops: bool
    label_values: tuple[int, ...]
    voxel_sides: SideRange | None = None

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
            crops, sides = bool(task["trained_on_crops"]), SideRange.from_dict(task.get("voxel_sides_mm"))
            return cls(folder, settings, names, decision, how, crops, values, sides)
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


def tell_unlike_sides(run: Run, path: Path, prepared: Prepared) -> None:
    """Warn where the networks see a scan's voxels unlike those that they were trained on."""
    spacing = nibabel.affines.voxel_sizes(prepared.affine)
    if run.is_3d and 1 in prepared.shape:
        LOGGER.warning("WARNING: %s is a single slice, and this run's networks were trained on volumes.", path)
    if run.voxel_sides is None or is_picture(path):
        return
    sides = seen_sides(prepared.shape, spacing, run.settings["patch_size"])
    if len(sides) == len(run.voxel_sides.low) and run.voxel_sides.is_unlike(sides):
        shown = "×".join(f"{side:.3g}" for side in sides)
        resample = "resample the scan, or train on data imported with --spacing_mm"
        how = resample if run.is_3d else "crop or pad its slices"
        LOGGER.warning(
            "WARNING: %s: the networks see voxels of %s mm, and were trained on %s mm; expect a worse result, or %s.",
            path, shown, run.voxel_sides, how,
        )  # fmt: skip


def inference_of(run: Run, config: Any, name: str) -> Infer:
    """Return what maps networks and a prepared volume to their probabilities, slab by slab; see code/predict.py.

    How far it is stands in a bar on a terminal, and at the end in a line of the log.

    Args:
        run: the trained run.
        config: the header.
        name: of the scan, for the line.
    """
    size = run.settings["patch_size"]
    stride = config.stride or [max(side // 2, 1) for side in size]

    def infer(networks: Sequence[nn.Module], volume: np.ndarray) -> Slabs:
        if not run.is_3d:
            progress = Progress(name, "slice", volume.shape[-3])
            given = run.num_classes, config.batch_size, config.precision
            for where, outputs in slice_slabs(networks, volume, size, *given):
                progress.on_done(where.stop - where.start, 0)
                yield where, outputs
        else:
            sides = zip(np.maximum(volume.shape[-3:], size).tolist(), size, stride, strict=True)
            progress = Progress(name, "window", math.prod(len(window_starts(*side)) for side in sides))
            how = config.window_batch, config.precision, config.window_weighting, config.tta, config.skip_air
            yield from window_slabs(
                networks, volume, Windows(size, stride, run.num_classes, *how, on_done=progress.on_done)
            )
        progress.end()

    return infer


class Progress:
    """How far a scan's prediction is.

    Args:
        name: of the scan.
        unit: "window" or "slice".
        total: number of them.
    """

    def __init__(self, name: str, unit: str, total: int):
        self._name, self._unit, self._total, self._skipped = name, unit, total, 0
        self._begin = time.monotonic()
        if unit == "window" and total > MANY_WINDOWS:
            LOGGER.info("%s: %s windows: --roi or a larger --stride makes them fewer", name, f"{total:,}")
        self._bar = tqdm(total=total, unit=unit, desc=name, leave=False, dynamic_ncols=True, disable=None)

    def on_done(self, count: int, skipped: int) -> None:
        """Count some as done, of which some were not computed."""
        self._skipped += skipped
        self._bar.update(count)
        if self._skipped:
            self._bar.set_postfix(skipped=self._skipped, refresh=False)

    def end(self) -> None:
        """Take the bar away and log the line."""
        self._bar.close()
        skipped = f", {self._skipped:,} of them of one value and not computed" if self._skipped else ""
        seconds = time.monotonic() - self._begin
        many = f"{self._total:,} {self._unit}{'s' * (self._total != 1)}"
        LOGGER.info("%s: %s%s, %.3g s", self._name, many, skipped, seconds)


def prepared_for(
    channels: Sequence[Scan], how: Preprocessing, roi: Box | None = None, trust_hu: bool = False
) -> Prepared:
    """Bring a scan, or a box of it, onto the networks' own grid.

    Args:
        channels: of an image, on one grid.
        how: what the networks' training files went through.
        roi: only this box of the scan, in its own voxels, (first, end) of each axis.
        trust_hu: take any values of a CT for HU.
    """
    prepared = prepare_channels(channels, how, trust_hu)
    if roi is None:
        return prepared
    return prepared.cropped(box_on_grid(roi, channels[0], prepared.affine, prepared.shape))


def segmented(prepared: Prepared, scan: Scan, infer: Infer, networks: Sequence[nn.Module]) -> Iterator[Placed]:
    """Predict a prepared scan, and bring the networks' mean probabilities onto the scan's own grid part by part.

    Where the networks' grid is the scan's but for swapped and flipped axes, each part is placed as soon as it is found,
    and no whole scan's probabilities are ever in memory; else they are, once, on the networks' grid.

    Args:
        prepared: from prepared_for().
        scan: gives shape (X, Y, Z) and geometry.
        infer: maps networks and a prepared volume (*S), or (channels, *S), to slabs of each network's probabilities.
        networks: their probabilities are averaged.

    Yields:
        Where in the scan, a slice of each axis, and the probabilities there, float32 (C, *part); what no part shows is
        background.
    """
    means = _means(infer(networks, prepared.array))
    turn = _turn_onto(scan, prepared.affine)
    if turn is not None:
        for where, mean in means:
            yield _turned_onto(scan.array.shape, turn, where.start, mean)
    else:
        (whole,) = put_together(((where, [mean]) for where, mean in means), prepared.shape)
        yield from planes_on_scan(Prepared(whole, prepared.affine), scan)


def _means(slabs: Slabs) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the networks' mean of each slab, which is not kept while the next one is computed."""
    for where, outputs in slabs:
        mean = mean_of(outputs)
        del outputs
        yield where, mean
        del mean


def _turn_onto(scan: Scan, affine: np.ndarray) -> np.ndarray | None:
    """Return the matrix (3, 4) of -1, 0, 1 and whole offsets from a grid's voxels to a scan's; None: there is none."""
    change = (np.linalg.inv(scan.affine) @ affine)[:3]
    whole = change.round()
    is_turn = (np.sort(np.abs(whole[:, :3]), axis=0) == [[0] * 3, [0] * 3, [1] * 3]).all()
    is_whole = np.allclose(change[:, :3], whole[:, :3], atol=1e-6) and np.allclose(change[:, 3], whole[:, 3], atol=1e-4)
    return whole.astype(int) if is_turn and is_whole else None


def _turned_onto(shape: Sequence[int], turn: np.ndarray, first: int, mean: np.ndarray) -> Placed:
    """Place a slab (C, planes, Y, Z), from a grid's plane `first` on, in a scan of a shape; see _turn_onto()."""
    order = np.abs(turn[:, :3]).argmax(axis=1)  # for each axis of the scan the slab's
    signs = turn[range(3), order]
    turned = np.flip(mean.transpose(0, *(order + 1)), [1 + k for k in range(3) if signs[k] < 0])
    corner = turn @ (first, 0, 0, 1)  # where the slab's first voxel lies
    low = np.where(signs < 0, corner - (np.array(turned.shape[1:]) - 1), corner)
    begin, end = np.maximum(low, 0), np.minimum(low + turned.shape[1:], shape)
    inside = tuple(slice(a, max(b, a)) for a, b in zip(begin - low, end - low, strict=True))
    return tuple(slice(a, max(b, a)) for a, b in zip(begin, end, strict=True)), _summing_to_one(
        turned[(slice(None), *inside)]
    )


def _summing_to_one(probabilities: np.ndarray) -> np.ndarray:
    """Give the background what the classes (C, *S) lack of 1, in place."""
    probabilities[0] += 1 - probabilities.sum(axis=0)
    return probabilities


def planes_on_scan(found: Prepared, scan: Scan) -> Iterator[Placed]:
    """Bring probabilities back onto a scan's own grid, some planes at a time; beyond theirs is background.

    Args:
        found: the probabilities (C, *S), and where their grid lies.
        scan: gives shape (X, Y, Z) and geometry.

    Yields:
        Where in the scan, some planes across its first axis, and the probabilities there, float32 (C, planes, Y, Z).
    """
    ones, sides = np.ones(found.shape, np.uint8), scan.array.shape
    for first in range(0, sides[0], PLANES):
        planes = slice(first, min(first + PLANES, sides[0]))
        there = scan.affine @ nibabel.affines.from_matvec(np.eye(3), (first, 0, 0))
        grid = (found.affine, (planes.stop - first, *sides[1:]), there)
        # An outermost voxel counts to its own border, undiminished.
        inside = resampled(ones, *grid, order=0, mode="grid-constant")
        placed = np.stack([resampled(channel, *grid, order=1) * inside for channel in found.array])
        yield (planes,), _summing_to_one(placed)


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
