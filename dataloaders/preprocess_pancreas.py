"""Pancreas: from Pancreas-CT's DICOM and labels to HDF5: `python dataloaders/preprocess_pancreas.py --images ...`."""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))  # this checkout's code, whichever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sdcl.runs.config import run_script  # first: from here on Ctrl-C ends without a traceback

# isort: split
import numpy as np

from dataloaders.pancreas import DATA_SET, LEFT_OUT
from dataloaders.scans.alignment import AXES, TRUSTED, check_alignment, measure_alignment
from dataloaders.scans.convert import Job, Origin, check_trust, convert, few, provenance, write_case
from dataloaders.scans.hounsfield import TRUSTED_HU
from dataloaders.scans.preprocessing import (
    WINDOW_HU,
    Preprocessing,
    at_least,
    label_box,
    prepare,
    prepare_label,
    with_margins,
)
from dataloaders.scans.reading import Scan, aligned_label, find_scans, label_by_index, read_label, read_scan
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER, start_logging, write_csv
from sdcl.runs.written_files import check_replaceable

if TYPE_CHECKING:
    from dataloaders.scans.unlabelled import Cropping

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = replace(DATA_SET.preprocessing, orientation=None, trust_slice_spacing=False)


@dataclass
class Config:
    """Convert Pancreas-CT: resample to 1 mm, clip to [-125, 275] HU, scale to [0, 1], crop around the pancreas."""

    images: Path  # folder of the scans: a DICOM folder for each case (PANCREAS_0001 ...), or NIfTI files
    labels: Path  # folder of the labels (label0001.nii.gz ...); the number joins both
    root_path: Path = ROOT / "Datasets" / "pancreas"  # the data set's folder; its data/ receives the files
    rule: Literal["header", "published"] = "header"  # published: in-plane spacing on all axes, label by index
    label_flip: tuple[Literal["x", "y", "z"], ...] = ()  # lay labels on by index, flipped so; headers do not count
    trust: tuple[str, ...] = ()  # cases whose label somebody has looked at and found right, or "all"
    trust_hu: bool = False  # scans are CT in HU though they look otherwise, such as soft tissue alone
    pixel_spacing_mm: tuple[float, float] | None = None  # of DICOM files that do not say it: between rows, columns
    locator: Path | None = None  # of code/locate_train.py: crops the scans without a label; None: they are refused
    margin: int = 25  # voxels (mm) beyond the label's box on each side
    min_side: int = 96  # voxels that a crop holds, where the scan has them
    workers: int = 2  # cases at a time; each takes up to 3 GiB
    overwrite: bool = False  # convert cases that are there, too


def case_number(name: str) -> int | None:
    """Return the last number in a name, or None."""
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else None


def in_file_order(image: Scan) -> tuple[Scan, bool]:
    """Order a DICOM series' slices by their files' names, as the published files have them.

    Returns:
        The scan, and whether its affine still says where its slices lie: it cannot where the names run in neither
        direction.
    """
    names = list(image.slice_names)
    if names == sorted(names):
        return image, True
    array = image.array[..., np.argsort(names)]
    turn = np.diag([1.0, 1.0, -1.0, 1.0])
    turn[2, 3] = len(names) - 1
    is_reversed = names == sorted(names, reverse=True)
    affine = image.affine @ turn if is_reversed else image.affine
    return replace(image, array=array, affine=affine, slice_names=tuple(sorted(names))), is_reversed


def check_case(label_path: Path, image: Scan, label: np.ndarray, name: str, trust: Sequence[str]) -> tuple[float, str]:
    """Refuse a label that does not lie on the pancreas, unless trusted; return its mean HU and who vouches for it."""
    clipped = np.clip(image.array, *WINDOW_HU)
    if name in trust or "all" in trust:
        return measure_alignment(clipped, label).mean, TRUSTED
    way_out = f"give --trust {name} (--label_flip lays labels on by index, flipped)"
    return check_alignment(label_path, clipped, label, is_organ_ct=True, way_out=way_out).mean, "checked"


def convert_case(image_path: Path, label_path: Path, target: Path, config: Config) -> None:
    """Align, resample, crop and write one case."""
    geometry = {"pixel_spacing_mm": config.pixel_spacing_mm} if config.pixel_spacing_mm else {}
    image, label = read_scan(image_path, **geometry), read_label(label_path, 2)
    is_published, is_placed = config.rule == "published", True
    if is_published or config.label_flip:
        image, is_placed = in_file_order(image) if is_published else (image, True)
        on_image = label_by_index(image, label, [AXES.index(axis) for axis in config.label_flip])
    else:
        on_image = aligned_label(image, label)
    how = preprocessing_of(config)
    prepared, mask = prepare(image, how, config.trust_hu, tell=False), prepare_label(on_image, image, how)
    mean_hu, alignment = check_case(label_path, image, on_image, target.stem, config.trust)
    if not mask.any():
        raise UserError(
            f"{label_path} vanishes at {how.spacing_mm[0]:g} mm: it is too small a label; leave the case out."
        )
    box = with_margins(label_box(mask), [(config.margin, config.margin)] * 3, mask.shape)
    box = at_least(box, [config.min_side] * 3, mask.shape)
    case = prepared.cropped(box)
    attributes = provenance(case, how, Origin(config.rule, config.images, (image_path,), label_path), box)
    attributes |= {"label_mean_hu": mean_hu, "alignment": alignment, "crop": crop_of(config)}
    attributes |= {"hu": TRUSTED_HU} if config.trust_hu else {}
    if not is_placed:
        attributes = {key: value for key, value in attributes.items() if key not in ("origin", "direction")}
        attributes["orientation"] = ""
        LOGGER.info("%s: its files' names run up and down the body; the file does not say where it lies", target.stem)
    write_case(target, case.array, mask[tuple(slice(*side) for side in box)], attributes)
    LOGGER.info(
        "%s: %s voxels, mean under the label %.0f HU", target.stem, "×".join(map(str, case.array.shape)), mean_hu
    )


def convert_unlabelled(image_path: Path, target: Path, config: Config, cropping: "Cropping") -> None:
    """Resample a scan, crop it round what the locator finds, and write the case without a label."""
    geometry = {"pixel_spacing_mm": config.pixel_spacing_mm} if config.pixel_spacing_mm else {}
    origin = Origin(config.rule, config.images, (image_path,), None)
    cropping.convert(read_scan(image_path, **geometry), preprocessing_of(config), origin, target, config.trust_hu)


def preprocessing_of(config: Config) -> Preprocessing:
    """Return what the rule does to a scan."""
    return PUBLISHED if config.rule == "published" else DATA_SET.preprocessing


def crop_of(config: Config) -> str:
    """Return what chooses label and crop, as the files' attributes keep it."""
    crop = {"margin": config.margin, "min_side": config.min_side, "label_flip": "".join(config.label_flip)}
    return json.dumps(crop)


def pair(images: Path, labels: Path, needs_label: bool = True) -> list[tuple[str, Path, Path | None]]:
    """Join scans and labels by their numbers.

    Args:
        images: folder of the scans.
        labels: folder of the labels.
        needs_label: refuse a scan without a label; else it is paired with None.

    Returns:
        Case name (data0001 ...), image and label, in the order of the numbers; without the duplicate cases.

    Raises:
        UserError: a scan has no label, or the numbers do not tell cases apart.
    """
    label_of: dict[int | None, Path] = {}
    for name, path in find_scans(labels).items():
        number = case_number(name)
        if number is None or number in label_of:
            raise UserError(
                f"--labels {labels}: {path.name} needs a number of its own, such as label0001.nii.gz: rename it."
            )
        label_of[number] = path
    pairs, left_out = [], []
    for name, path in find_scans(images).items():
        number = case_number(name)
        if number in LEFT_OUT:
            left_out.append(name)
        elif number not in label_of and (needs_label or number is None):
            raise UserError(
                f"--labels {labels} has no label of the number {number} of {path}: add it, or move the scan away."
            )
        elif f"data{number:04d}" in [case for case, *_ in pairs]:
            raise UserError(f"--images {images} holds two scans of the number {number}: move one of them away.")
        else:
            pairs.append((f"data{number:04d}", path, label_of.get(number)))
    used = {label for _, _, label in pairs} | {label_of[n] for n in LEFT_OUT if n in label_of}
    alone = [path.name for path in label_of.values() if path not in used]
    if alone:
        LOGGER.info("%d labels in %s have no scan in %s: %s", len(alone), labels, images, few(alone))
    if left_out:
        LOGGER.info("left out %s: duplicates of other cases, named in no published list", ", ".join(left_out))
    if not pairs:
        raise UserError(f"--images {images} holds no other cases than these duplicates: give the whole collection.")
    return sorted(pairs, key=lambda one: one[0])


def main(config: Config) -> None:
    """Find the cases, write the table of their names, convert them."""
    start_logging()
    if config.locator is not None and config.rule == "published":
        raise UserError("--locator goes by headers: give --rule header, too, or leave --locator out.")
    pairs = pair(config.images, config.labels, config.locator is None)
    check_trust(config.trust, [name for name, _, label in pairs if label])
    cropping = None
    if config.locator is not None:
        from dataloaders.scans.unlabelled import Cropping, tell_unlabelled  # with PyTorch, for it alone

        cropping = Cropping.of(config.locator, [config.min_side] * 3)
    check_replaceable(config.root_path / "data" / "cases.csv")
    table = [{"case": name, "image": image.name, "label": label.name if label else ""} for name, image, label in pairs]
    write_csv(config.root_path / "data" / "cases.csv", table)
    LOGGER.info(
        "%d cases by the rule '%s'; names: %s", len(pairs), config.rule, config.root_path / "data" / "cases.csv"
    )
    made_by = {"rule": config.rule, "preprocessing": preprocessing_of(config).to_json()}
    jobs = []
    for name, image, label in pairs:
        target = DATA_SET.path_of(config.root_path, name)
        run = lambda i=image, m=label, t=target: convert_case(i, m, t, config)  # noqa: E731
        if label is None:
            run = lambda i=image, t=target: convert_unlabelled(i, t, config, cropping)  # noqa: E731
        crop = crop_of(config) if label else cropping.rule
        jobs.append(Job(name, [target], run, (image,), label, made_by | {"crop": crop}))
    convert(jobs, config.workers, config.overwrite, (config.root_path / "data").glob("*.h5"))
    if cropping:
        tell_unlabelled([job.name for job in jobs if job.label is None], config.root_path)


if __name__ == "__main__":
    run_script(main, Config)
