"""The page's slice viewer: each case's scan and label maps as mosaics of slices, small enough for one file."""

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdcl.runs.errors import UserError
from sdcl.scoring.evaluation import Case, Task
from sdcl.scoring.figures import CLASS_COLOURS, DISCREPANCY_COLOUR, OVERLAY, disagreement, is_xyz

BUDGET = 4_000_000  # bytes of all mosaics in base64, so that the page stays below 5 MB
MAX_SIDE = 16_383  # of a WebP picture, pixels
PERCENTILES = (0.2, 99.8)  # of the intensities, that 8 bits are spread over
# Qualities of the scan's WebP, and every how many voxels are kept: the first that fits the budget is taken.
SIZES = ((60, 1), (30, 1), (10, 1), (5, 1), (40, 2), (10, 2))
SMALLER = ((10, 3), (10, 4), (10, 6), (10, 8), (5, 12), (5, 16))  # when not even three cases fit
SHOWN_DIFFER = "where those that are shown disagree"
LEAST_CASES = 3  # worst, median, best
ORDINALS = {2: "second", 3: "third", 4: "fourth", 6: "sixth", 8: "eighth"}
DATA = re.compile(r'<script type="application/json" id="viewer">(.*?)</script>', re.DOTALL)


@dataclass(frozen=True)
class Shown:
    """A case with its label maps.

    Attributes:
        title: what the list of cases calls it.
        case: the volume (*S) of three dimensions.
        maps: label maps (*S) by name, the answer last.
    """

    title: str
    case: Case
    maps: Mapping[str, np.ndarray]


def viewer(cases: Sequence[Shown], task: Task, pair: Sequence[str], budget: int = BUDGET) -> dict[str, Any]:
    """Return what the page's script shows, as JSON knows it.

    Args:
        cases: in the order of the list.
        task: for the structures' names and how axes are shown.
        pair: names of the two maps whose disagreement can be shown; empty: of all that are shown.
        budget: bytes that all mosaics may take.

    Returns:
        The cases, "said" of what was left out or made smaller, and how to draw.
    """
    voxels = sum(one.case.label.size for one in cases)
    labels: dict[tuple[int, int], dict[str, str]] = {}  # by case and step: they do not depend on the quality
    for quality, step in (*SIZES, *SMALLER):
        may_leave_out = (quality, step) in (SIZES[-1], *SMALLER)
        encoded, total = [], 0
        for k, one in enumerate(cases):
            if not _fits_a_picture(one, task, step):
                break
            if (k, step) not in labels:
                labels[k, step] = _label_mosaics(one, task, step)
            content, size = _encoded(one, task, (quality, step), labels[k, step])
            if total + size > budget or (not may_leave_out and size * voxels > 1.2 * budget * one.case.label.size):
                break
            encoded.append(content)
            total += size
        if len(encoded) == len(cases) or (may_leave_out and len(encoded) >= LEAST_CASES):
            break
    said = f"Scans in 8 bits and compressed (WebP of quality {quality}), label maps as they are"
    said += f", both at every {ORDINALS.get(step, f'{step}th')} voxel" if step > 1 else ""
    said += f"; {len(cases) - len(encoded)} of {len(cases)} cases left out" if len(encoded) < len(cases) else ""
    said += ", so that this page stays small." if step > 1 or len(encoded) < len(cases) else "."
    names = list(dict.fromkeys(name for one in cases for name in one.maps))
    return {
        "cases": encoded, "names": names, "structures": list(task.class_names), "said": said,
        "differ": {"name": f"where {disagreement(pair)}" if pair else SHOWN_DIFFER, "of": list(pair)},
        "planes": ["axial", "coronal", "sagittal"] if is_xyz(task) else ["slice", "row", "column"],
        "flip": is_xyz(task), "opacity": OVERLAY, "colours": [_hex(colour) for colour in CLASS_COLOURS],
        "disagreement": _hex(DISCREPANCY_COLOUR),
    }  # fmt: skip


def read_viewer(page: Path) -> dict[str, Any]:
    """Read what viewer() returned from a page.

    Raises:
        UserError: the page is missing or holds nothing of the kind.
    """
    try:
        return json.loads(DATA.search(page.read_text(encoding="utf-8"))[1])
    except (OSError, ValueError, TypeError):
        raise UserError(f"{page} cannot be read: give the run's test again, which writes it.") from None


def joined(
    of_rows: Mapping[str, tuple[Mapping[str, Any], str]], names: Sequence[str], budget: int = BUDGET
) -> dict[str, Any]:
    """Put several runs' viewers into one: the scans and references once, of each row one map.

    Args:
        of_rows: what viewer() returned and which of its maps to take, by row.
        names: of the cases, in the order to show.
        budget: see viewer().
    """
    whole, _ = next(iter(of_rows.values()))
    cases, total = [], 0
    for rank, name in enumerate(names):
        there = {
            row: (one, title) for row, (data, title) in of_rows.items() for one in data["cases"] if one["name"] == name
        }
        if not there:
            continue
        first = next(iter(there.values()))[0]
        # Pages of other sizes hold other mosaics.
        maps = {row: one["maps"][title] for row, (one, title) in there.items() if one["shape"] == first["shape"]}
        size = len(first["image"]) + len(first["reference"]) + sum(map(len, maps.values()))
        if total + size > budget:
            break
        total += size
        title = f"{('worst: ', 'median: ', 'best: ')[rank]}{name}" if rank < LEAST_CASES <= len(names) else name
        cases.append({**first, "title": title, "maps": maps})
    left_out = len(names) - len(cases)
    said = f" {left_out} of {len(names)} cases are left out here, so that this page stays small." if left_out else ""
    return {
        **whole,
        "cases": cases,
        "names": list(of_rows),
        "differ": {"name": SHOWN_DIFFER, "of": []},
        "said": whole["said"].split(";")[0] + said,
    }


def _turned(volume: np.ndarray, task: Task, step: int) -> np.ndarray:
    """Return every so many voxels of a volume as (slices, rows, columns)."""
    volume = volume.transpose(2, 1, 0) if is_xyz(task) else volume
    return volume[::step, ::step, ::step]


def _fits_a_picture(one: Shown, task: Task, step: int) -> bool:
    """Tell whether a case's slices fit beside and below each other into one picture."""
    depth, rows, columns = _turned(one.case.label, task, step).shape
    beside = _columns((depth, rows, columns))
    return columns <= MAX_SIDE and math.ceil(depth / beside) * rows <= MAX_SIDE


def _label_mosaics(one: Shown, task: Task, step: int) -> dict[str, str]:
    """Return the mosaics of the reference, called "", and of the label maps."""
    return {
        name: _labels(turned, _columns(turned.shape))
        for name, label in {"": one.case.label, **one.maps}.items()
        for turned in [_turned(label, task, step)]
    }


def _encoded(one: Shown, task: Task, size: tuple[int, int], labels: Mapping[str, str]) -> tuple[dict[str, Any], int]:
    """Return a case's content and the bytes of its mosaics; size: the scan's quality, and every how many voxels."""
    quality, step = size
    image = _turned(one.case.shown, task, step).astype(np.float32)
    spacing = one.case.spacing[::-1] if is_xyz(task) and one.case.spacing else one.case.spacing
    finite = image[np.isfinite(image)]
    low, high = map(float, np.percentile(finite, PERCENTILES)) if finite.size else (0.0, 1.0)
    high = high if high > low else low + 1.0
    grey = np.clip(np.nan_to_num((image - low) / (high - low)) * 255 + 0.5, 0, 255).astype(np.uint8)
    columns = _columns(grey.shape)
    scan = _webp(_mosaic(grey, columns), quality=quality)
    content = {
        "name": one.case.name, "title": one.title, "shape": list(grey.shape), "columns": columns,
        "spacing": [side * step for side in spacing] if spacing else None, "low": low, "high": high,
        "image": scan, "reference": labels[""], "maps": {name: mosaic for name, mosaic in labels.items() if name},
    }  # fmt: skip
    return content, len(scan) + sum(map(len, labels.values()))


def _columns(shape: Sequence[int]) -> int:
    """Return how many slices stand side by side in a mosaic that is about square."""
    depth, rows, columns = shape
    return max(1, min(depth, MAX_SIDE // columns, round(math.sqrt(depth * rows / columns))))


def _mosaic(volume: np.ndarray, columns: int) -> np.ndarray:
    """Lay a volume's slices (D, H, W) side by side, row by row: (rows * H, columns * W)."""
    depth, height, width = volume.shape
    rows = math.ceil(depth / columns)
    padded = np.zeros((rows * columns, height, width), volume.dtype)
    padded[:depth] = volume
    return padded.reshape(rows, columns, height, width).transpose(0, 2, 1, 3).reshape(rows * height, columns * width)


def _labels(volume: np.ndarray, columns: int) -> str:
    """Return classes (D, H, W) as a lossless mosaic: a class's low byte is red, its high byte green."""
    mosaic = _mosaic(volume, columns)
    parts = (mosaic & 255, mosaic >> 8, np.zeros_like(mosaic))
    return _webp(np.stack([part.astype(np.uint8) for part in parts], axis=-1), lossless=True)


def _webp(picture: np.ndarray, **how: Any) -> str:
    """Return a picture as the address of a WebP that stands in the page itself."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "WEBP", method=4, **how)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _hex(colour: Sequence[float]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour)
