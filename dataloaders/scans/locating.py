"""Where in a whole scan a structure lies: a box by a small network on a coarse grid, and what makes it doubtful."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import nn

from dataloaders.scans.prediction import box_on_grid, check_roi
from dataloaders.scans.preprocessing import Box, Prepared, Preprocessing, at_least, label_box, prepare, with_margins
from dataloaders.scans.reading import Scan
from sdcl.checkpoints import load_weights, save
from sdcl.inference import one_window
from sdcl.networks import build_network
from sdcl.runs.atomic import write_text
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

DESCRIPTION, WEIGHTS = "locator.json", "weights.pth"  # the description is written last
MAX_DESCRIPTION_BYTES = 2**24
SIDES = (("right", "left"), ("front", "back"), ("bottom", "top"))  # of the patient, along the axes of "LPS"
FOUND, REACH = 0.5, 0.1  # probability from which on a voxel is the structure; is in its box, if connected to it
SURE = 0.75  # mean probability within the structure, below which it is doubtful
RIVAL = 0.3  # of the structure's volume: another place of so much makes it doubtful
VOLUME_SLACK, SIDE_SLACK = 1.5, 1.3  # times the training cases' largest, and their smallest over it


@dataclass(frozen=True)
class Facts:
    """What a locator is beside its weights; its description keeps it.

    Attributes:
        preprocessing: of scans, onto the coarse grid; axes "LPS".
        margin_mm: round what is found, on each side.
        least_mm: a box's least sides along x, y and z, the patient's; where a scan is shorter it is whole.
        volumes_ml: smallest and largest structure of the training cases, on the coarse grid.
        sides_mm: the same of its sides along x, y and z.
        at_edge: for x, y and z, whether a training case's structure lies at the scan's first, and last, coarse voxel.
        trained_on: names of these cases.
        channel: that it looks at, of images of several; "" of one.
    """

    preprocessing: Preprocessing
    margin_mm: float
    least_mm: tuple[float, float, float]
    volumes_ml: tuple[float, float]
    sides_mm: tuple[tuple[float, float], ...]
    at_edge: tuple[tuple[bool, bool], ...]
    trained_on: tuple[str, ...]
    channel: str = ""

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Facts":
        """Make them of what dataclasses.asdict() gave, read back from JSON.

        Raises:
            ValueError, KeyError, TypeError: the content is not that.
        """
        facts = cls(
            Preprocessing.from_dict(content["preprocessing"]), float(content["margin_mm"]),
            tuple(map(float, content["least_mm"])), tuple(map(float, content["volumes_ml"])),
            tuple(tuple(map(float, pair)) for pair in content["sides_mm"]),
            tuple(tuple(map(bool, pair)) for pair in content["at_edge"]), tuple(map(str, content["trained_on"])),
            str(content.get("channel", "")),
        )  # fmt: skip
        numbers = [facts.margin_mm, *facts.least_mm, *facts.volumes_ml, *sum(facts.sides_mm, ())]
        if not np.isfinite(numbers).all() or min(numbers) < 0 or facts.preprocessing.spacing_mm is None:
            raise ValueError("a number is negative, or there is no coarse grid")
        if [len(facts.least_mm), len(facts.volumes_ml), len(facts.sides_mm), len(facts.at_edge)] != [3, 2, 3, 3]:
            raise ValueError("another count of sides")
        if {len(pair) for pair in (*facts.sides_mm, *facts.at_edge)} != {2}:
            raise ValueError("a side without its two ends")
        return facts


@dataclass(frozen=True)
class Located:
    """A structure's place in a scan.

    Attributes:
        box: with its margin, in the scan's own voxels, (first, end) of each axis.
        doubts: each a clause that says why the box may be wrong; () for none.
        volume_ml: of what was found, on the coarse grid.
    """

    box: Box
    doubts: tuple[str, ...]
    volume_ml: float

    @property
    def roi(self) -> str:
        """Return the box as --roi takes it."""
        return " ".join(f"{first} {end}" for first, end in self.box)


@dataclass(frozen=True)
class Locator:
    """A trained locator.

    Attributes:
        facts: beside the weights.
        network: maps (N, 1, *S) to logits (N, 2, *S).
        folder: that it was read from.
        digest: SHA-256 of the weights' file.
    """

    facts: Facts
    network: nn.Module
    folder: Path = Path()
    digest: str = ""

    @classmethod
    def read(cls, folder: Path, device: torch.device) -> "Locator":
        """Read a locator's folder.

        Raises:
            UserError: it is none, or its two files do not belong together.
        """
        check_locator(folder)
        try:
            content = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            facts, digest, name = Facts.from_dict(content["facts"]), content["weights_sha256"], content["network"]
            network = build_network(name, 2)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"--locator: {folder / DESCRIPTION} cannot be read ({error}): restore it, or train the locator again."
            ) from None
        load_weights(network, folder / WEIGHTS)
        if hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() != digest:
            raise UserError(
                f"--locator: {folder / WEIGHTS} is not the file that {DESCRIPTION} was written for: restore both, or "
                "train the locator again."
            )
        return cls(facts, network.to(device).eval(), folder, digest)

    def locate(self, scan: Scan, trust_hu: bool = False) -> Located:
        """Find the structure in a scan.

        Args:
            scan: whole, as it was read.
            trust_hu: take any values of a CT for HU.

        Raises:
            UserError: nothing is found, or the scan does not suit the preprocessing.
        """
        seen = coarsely(scan, self.facts.preprocessing, trust_hu)
        return self.locate_coarse(seen, scan)

    def locate_coarse(self, seen: Prepared, scan: Scan) -> Located:
        """Find the structure in a scan that coarsely() has shown; see locate()."""
        return located(one_window(self.network, seen.array)[1], seen.affine, scan, self.facts)


def coarsely(scan: Scan, how: Preprocessing, trust_hu: bool = False) -> Prepared:
    """Bring a scan onto a locator's coarse grid, each voxel the mean of what it covers."""
    smooth = ndimage.uniform_filter(scan.array, window_of(scan, how), mode="nearest")
    return prepare(dataclasses.replace(scan, array=smooth), how, trust_hu, tell=False)


def window_of(scan: Scan, how: Preprocessing) -> list[int]:
    """Return how many of a scan's voxels a coarse one covers, along each axis; coarse voxels are cubes."""
    return [max(1, round(how.spacing_mm[0] / side)) for side in scan.spacing_mm]


def located(probability: np.ndarray, affine: np.ndarray, scan: Scan, facts: Facts) -> Located:
    """Turn the probability of a structure on a coarse grid into a box of the scan.

    Args:
        probability: float32 (X, Y, Z).
        affine: (4, 4), of the coarse grid, whose axes point as "LPS" says.
        scan: whose voxels the box counts.
        facts: of the locator.

    Raises:
        UserError: no voxel is above FOUND.
    """
    neighbours = np.ones((3, 3, 3))
    parts, count = ndimage.label(probability > FOUND, neighbours)
    if not count:
        raise UserError(
            f"{scan.path}: the locator finds nothing (its highest probability is {probability.max():.2f}): look at "
            "the scan; if the structure is there, predict.py takes its surroundings as --roi."
        )
    sizes = np.bincount(parts.ravel())[1:]
    structure = parts == sizes.argmax() + 1
    around = ndimage.binary_propagation(structure, neighbours, probability > REACH)
    grid = Scan(scan.path, probability, affine)
    spacing = grid.spacing_mm
    box = with_margins(label_box(around), [(0.5 + facts.margin_mm / side,) * 2 for side in spacing], structure.shape)
    box = at_least(box, [least / side for least, side in zip(facts.least_mm, spacing, strict=True)], structure.shape)
    # The coarse grid may end a little before the scan.
    reach = zip(box, structure.shape, strict=True)
    box = tuple((first if first > 0 else -1, end if end < side else side + 1) for (first, end), side in reach)
    doubts = doubts_of(float(probability[structure].mean()), sizes, label_box(structure), grid, facts)
    return Located(box_on_grid(box, grid, scan.affine, scan.array.shape), doubts, measured(structure, spacing)[0])


def measured(structure: np.ndarray, spacing_mm: Sequence[float]) -> tuple[float, tuple[float, ...]]:
    """Return a structure's volume in ml, and the sides of its box in mm."""
    sides = [(end - first) * side for (first, end), side in zip(label_box(structure), spacing_mm, strict=True)]
    return float(structure.sum() * np.prod(spacing_mm) / 1000), tuple(map(float, sides))


def doubts_of(sureness: float, sizes: np.ndarray, tight: Box, grid: Scan, facts: Facts) -> tuple[str, ...]:
    """Say what of a found structure is unlike the training cases'.

    Args:
        sureness: mean probability within it.
        sizes: voxels of each place that was found; the structure is the largest.
        tight: its box, on the coarse grid.
        grid: the coarse grid.
        facts: of the locator.
    """
    doubts = [f"its mean probability is {sureness:.2f}"] if sureness < SURE else []
    others = np.sort(sizes)[:-1]
    if len(others) and others[-1] >= RIVAL * sizes.max():
        doubts.append(f"another place has {others[-1] / sizes.max():.0%} of its volume")
    volume = float(sizes.max() * np.prod(grid.spacing_mm) / 1000)
    low, high = facts.volumes_ml
    if not low / VOLUME_SLACK <= volume <= high * VOLUME_SLACK:
        doubts.append(f"it has {volume:.3g} ml, the training cases' {low:.3g} to {high:.3g}")
    for axis, ((first, end), side, (low, high)) in enumerate(zip(tight, grid.spacing_mm, facts.sides_mm, strict=True)):
        length, ends = (end - first) * side, SIDES[axis]
        if not low / SIDE_SLACK - side <= length <= high * SIDE_SLACK + side:
            doubts.append(
                f"it is {length:.0f} mm from {ends[0]} to {ends[1]}, the training cases' {low:.0f} to {high:.0f}"
            )
        reaches = (first == 0, end == grid.array.shape[axis])
        cut = [ends[k] for k in (0, 1) if reaches[k] and not facts.at_edge[axis][k]]
        doubts += [f"it reaches the scan's {name}, which no training case's does" for name in cut]
    return tuple(doubts)


def tell(name: str | Path, found: Located, locator: Locator) -> None:
    """Log a box as --roi takes it, and its doubts."""
    LOGGER.info("%s: located by %s: --roi %s (%.3g ml)", name, locator.folder.name, found.roi, found.volume_ml)
    if found.doubts:
        LOGGER.info("NOTE: %s: the locator is unsure (%s): look at it", name, "; ".join(found.doubts))


def check_locator(folder: Path | None) -> None:
    """Refuse a folder that is no locator's.

    Raises:
        UserError: says what is missing.
    """
    if folder is None:
        raise UserError("--roi auto needs --locator, the folder that code/locate_train.py wrote.")
    missing = next((name for name in (DESCRIPTION, WEIGHTS) if not (folder / name).is_file()), None)
    if missing:
        raise UserError(
            f"--locator {folder} is no locator's folder, it has no {missing}: give the one that locate_train.py wrote."
        )
    if (folder / DESCRIPTION).stat().st_size > MAX_DESCRIPTION_BYTES:
        raise UserError(f"--locator: {folder / DESCRIPTION} is too large to be a description: restore it.")


def save_locator(folder: Path, facts: Facts, network: nn.Module, network_name: str, more: dict[str, Any]) -> None:
    """Write a locator's two files, each whole or not at all.

    Args:
        folder: made where it is missing.
        facts: beside the weights.
        network: the weights.
        network_name: as build_network() takes it.
        more: what else the description keeps, for readers.
    """
    save({"net": {name: tensor.cpu() for name, tensor in network.state_dict().items()}}, folder / WEIGHTS)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    content = {"network": network_name, "weights_sha256": digest, "facts": dataclasses.asdict(facts)} | more
    write_text(folder / DESCRIPTION, json.dumps(content, indent=2) + "\n")


def roi_finder(config: Any, device: torch.device, names: Sequence[str]) -> Callable[[Sequence[Scan]], Box | None]:
    """Return what gives each scan's box, as --roi and --locator of code/predict.py's header say.

    Args:
        config: the header.
        device: where the locator computes.
        names: of the scans' channels; empty: one.

    Raises:
        UserError: the flags contradict each other, or there is no such locator.
    """
    if config.roi != "auto":
        if config.locator is not None:
            raise UserError("--locator is for --roi auto: give that, too, or leave --locator out.")
        return lambda channels: check_roi(config.roi, channels[0]) if config.roi else None
    locator = Locator.read(config.locator, device)
    channel = locator.facts.channel
    if channel and channel not in names:
        raise UserError(
            f"--locator {config.locator} looks at the channel {channel}, and these scans have "
            f"{', '.join(names) or 'one without a name'}: train a locator on these."
        )
    if names and not channel:
        LOGGER.info("NOTE: %s learned from images of one channel; it looks at %s here", config.locator, names[0])
    number = list(names).index(channel) if channel else 0

    def find(channels: Sequence[Scan]) -> Box:
        scan = channels[number]
        found = locator.locate(scan, config.trust_hu)
        tell(scan.path, found, locator)
        return found.box

    return find
