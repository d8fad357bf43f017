"""Your own scans and labels to HDF5 and lists: `python dataloaders/import_nifti.py --help`; see docs/own_data.md."""

import difflib
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dataloaders.alignment import TRUSTED, check_alignment
from dataloaders.convert import Job, convert, provenance, write_case, write_slices
from dataloaders.datasets import SLICE
from dataloaders.files import read_list, sample_rng
from dataloaders.own import DESCRIPTION, is_name
from dataloaders.preprocessing import WINDOW_HU, Normalisation, Preprocessing, prepare, prepare_label
from dataloaders.scans import Scan, aligned_label, find_scans, read_label, read_scan
from dataloaders.slices import find_file
from sdcl.atomic import write_text
from sdcl.config import run_script
from sdcl.errors import UserError
from sdcl.runs import LOGGER, start_logging

CHANNEL = "_0000"  # that nnU-Net's image names end with, and its label names do not


@dataclass
class Config:
    """Import scans (NIfTI, NRRD or DICOM folders) and the labels of some of them, joined by name, as a data set."""

    images: Path  # folder of the scans
    labels: Path  # folder of the labels; a scan without one becomes an unlabelled training case
    output: Path  # the data set's folder; receives data/, data_split/ and dataset.json
    normalise: Normalisation  # zscore or minmax over the scan (MRI); ct: [-125, 275] HU to [0, 1]
    layout: Literal["volume", "slices"] = "volume"  # volume: 3D networks; slices: 2D, across the longest voxel side
    spacing_mm: tuple[float, float, float] | None = None  # resample to these voxel sides, mm; None: each scan's own
    class_names: tuple[str, ...] = ()  # of the labels 1, 2, ...; empty: class1, class2, ...
    label_values: tuple[int, ...] = ()  # values in the label files that become 1, 2, ...; empty: they are these
    test_fraction: float = 0.2  # of the labelled cases, set aside for the test
    val_fraction: float = 0.0  # of the labelled cases, set aside for validation
    test_list: Path | None = None  # names of the test cases, one a line, instead of --test_fraction
    trust: tuple[str, ...] = ()  # CT cases whose label somebody has looked at and found right, or "all"
    seed: int = 1337  # of the choice of cases
    workers: int = 2  # cases at a time
    overwrite: bool = False  # convert cases that are there, too


def join(images: Path, labels: Path) -> dict[str, tuple[Path, Path | None]]:
    """Join scans and labels by name.

    Returns:
        Case name to scan and label, or None without one.

    Raises:
        UserError: a label has no scan.
    """
    if images.resolve() == labels.resolve():
        raise UserError(f"--images and --labels are both {images}: give the folder of each.")
    masks, found = find_scans(labels), find_scans(images)
    stems = {name.removesuffix(CHANNEL) for name in found if name.endswith(CHANNEL)} & set(masks)
    second = next(
        (name for name in found if re.sub(r"_\d{4}$", "", name) in stems and not name.endswith(CHANNEL)), None
    )
    if second:
        raise UserError(
            f"{found[second]} is another channel or copy of {re.sub(r'_[0-9]{4}$', '', second)}{CHANNEL}: leave one "
            "channel of each case in the folder."
        )
    scans = {name if name in masks else name.removesuffix(CHANNEL): path for name, path in found.items()}
    for name, path in masks.items():
        if name not in scans:
            close = difflib.get_close_matches(name, scans, n=1)
            hint = f"the closest is {scans[close[0]].name}" if close else f"there are {', '.join(list(scans)[:3])} ..."
            raise UserError(f"{path} has no scan of the name {name} in {images} ({hint}): rename one of them.")
    wrong = next((name for name in scans if SLICE in name), None)
    if wrong:
        raise UserError(f"{scans[wrong]}: a case's name must not contain {SLICE}: rename it.")
    return {name: (path, masks.get(name)) for name, path in scans.items()}


def label_values(labels: Sequence[Path], chosen: Sequence[int], workers: int) -> list[int]:
    """Return the label files' values that become the classes 1, 2, ...

    Raises:
        UserError: without a choice the values are not 1, 2, ...; or a file holds others than those chosen.
    """
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(lambda path: set(np.unique(read_label(path).array).tolist()) - {0}, labels))
    values = list(chosen) or sorted(set().union(*found))
    if not chosen and values != list(range(1, len(values) + 1)):
        raise UserError(
            f"the labels hold the values {values}, not 1, 2, ...: give --label_values {' '.join(map(str, values))} "
            "to number them so, or correct the files."
        )
    for path, there in zip(labels, found, strict=True):
        if not there <= set(values):
            raise UserError(
                f"{path} holds the label {min(there - set(values))}, which --label_values does not name: add it."
            )
    return values


def split(labelled: Sequence[str], config: Config) -> tuple[list[str], list[str], list[str]]:
    """Divide the labelled cases into training, validation and test.

    Raises:
        UserError: fewer than two are left for training, or the test list names others.
    """
    if not (0 <= config.test_fraction < 1 and 0 <= config.val_fraction < 1):
        raise UserError(
            f"--test_fraction {config.test_fraction} and --val_fraction {config.val_fraction} must lie in [0, 1)."
        )
    order = sample_rng(config.seed, "split").permutation(sorted(labelled)).tolist()
    test = read_list(config.test_list) if config.test_list else order[: round(config.test_fraction * len(order))]
    unknown = next((name for name in test if name not in labelled), None)
    if unknown:
        raise UserError(
            f"--test_list {config.test_list} names {unknown}, which has no scan or no label: correct the list."
        )
    rest = [name for name in order if name not in test]
    val = rest[: round(config.val_fraction * len(labelled))]
    train = [name for name in rest if name not in val]
    if not test:
        raise UserError(
            f"no case of the {len(labelled)} labelled ones is left for the test: raise --test_fraction, or give "
            "--test_list."
        )
    if len(train) < 2:
        raise UserError(
            f"{len(train)} labelled cases are left for training, {len(val)} for validation, {len(test)} for the test: "
            "at least two must be left; lower --test_fraction or --val_fraction, or label more."
        )
    return sorted(train), sorted(val), sorted(test)


def convert_case(
    name: str, image_path: Path, label_path: Path | None, how: Preprocessing, values: Sequence[int], config: Config
):
    """Align, preprocess and write one case, in 2D its single slices first."""
    image, mask, alignment = read_scan(image_path), None, ""
    if label_path is not None:
        label = read_label(label_path)
        classes = np.zeros(256, np.uint8)
        classes[list(values)] = range(1, len(values) + 1)
        on_image = aligned_label(image, Scan(label_path, classes[label.array], label.affine))
        alignment = TRUSTED if name in config.trust or "all" in config.trust else "checked"
        if how.normalise == "ct" and alignment != TRUSTED:
            clipped = np.clip(image.array, *WINDOW_HU)
            check_alignment(label_path, clipped, on_image, is_organ_ct=False, way_out=f"give --trust {name}")
        mask = prepare_label(on_image, image, how)
    case = prepare(image, how)
    attributes = provenance(case, how, rule="import_nifti", image=image_path, label=label_path, raw=config.images)
    attributes["alignment"] = alignment
    if how.layout == "slices":
        write_slices(config.output, name, case.array, mask, attributes)
    else:
        write_case(config.output / "data" / f"{name}.h5", case.array, mask, attributes)


def write_lists(
    config: Config, labelled: Sequence[str], unlabelled: Sequence[str], val: Sequence[str], test: Sequence[str]
):
    """Write the lists, labelled cases first; in 2D the training cases' slices."""
    folder, suffix = config.output / "data_split", ".txt" if config.layout == "volume" else ".list"
    lists = {"train": [*labelled, *unlabelled], "test": test}
    parts = {"train_lab": labelled, "train_unlab": unlabelled}
    if config.layout == "slices":
        parts = {key: [s for name in names for s in slices_of(config.output, name)] for key, names in parts.items()}
        parts["train_slices"] = [*parts["train_lab"], *parts["train_unlab"]]
    lists |= parts | ({"val": val} if val else {})
    (folder / f"val{suffix}").unlink(missing_ok=True)  # of an import with other fractions
    for key, names in lists.items():
        write_text(folder / f"{key}{suffix}", "".join(f"{name}\n" for name in names))


def slices_of(root: Path, name: str) -> list[str]:
    """Return the names of a case's slices, in order."""
    count = len(list((root / "data" / "slices").glob(f"{name}{SLICE}*.h5")))
    return [f"{name}{SLICE}{k}" for k in range(1, count + 1)]


def _check(config: Config) -> None:
    """Refuse impossible settings before anything is read."""
    if config.workers < 1:
        raise UserError(f"--workers is {config.workers}: it must be above 0.")
    values = config.label_values
    if len(set(values)) < len(values) or not all(1 <= value <= 255 for value in values):
        raise UserError(f"--label_values {' '.join(map(str, values))} must be different numbers from 1 to 255.")
    name = config.output.resolve().name
    if not is_name(name):
        raise UserError(f"--output {config.output}: the folder's name must be of letters, digits, - and _.")


def _check_same(config: Config, content: dict[str, Any]) -> None:
    """Refuse to go on with a data set that was imported in another way: its finished files would stay as they are."""
    path = config.output / DESCRIPTION
    if config.overwrite or not path.exists():
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key, value in content.items() if key in there and there[key] != value]
    except (OSError, ValueError, TypeError):
        return
    if differing:
        raise UserError(
            f"{path} is of an import with other {' and '.join(differing)}: give --overwrite to convert all cases "
            "again, another --output, or the earlier settings."
        )


def main(config: Config) -> None:
    """Join, check, convert, and write the lists and the description."""
    start_logging()
    _check(config)
    cases = join(config.images, config.labels)
    labels = {name: label for name, (_, label) in cases.items() if label is not None}
    values = label_values(list(labels.values()), config.label_values, config.workers)
    names = list(config.class_names) or [f"class{k}" for k in range(1, len(values) + 1)]
    if len(names) != len(values):
        raise UserError(
            f"--class_names gives {len(names)} names for the {len(values)} label values {values}: name each one."
        )
    train, val, test = split(list(labels), config)
    how = Preprocessing(config.normalise, "LPS", config.spacing_mm, layout=config.layout)
    content = {"name": config.output.resolve().name, "class_names": names, "preprocessing": json.loads(how.to_json())}
    content["label_values"] = values
    _check_same(config, content)
    jobs = []
    for name, (image, label) in cases.items():
        run = lambda n=name, i=image, m=label: convert_case(n, i, m, how, values, config)  # noqa: E731
        jobs.append(Job(name, [find_file(config.output, name)], run))
    convert(jobs, config.workers, config.overwrite)
    unlabelled = [name for name, (_, label) in cases.items() if label is None]
    write_lists(config, train, unlabelled, val, test)
    write_text(config.output / DESCRIPTION, json.dumps(content, indent=2) + "\n")
    counts = (len(train), len(unlabelled), len(val), len(test))
    LOGGER.info("%s: %d labelled, %d unlabelled, %d validation and %d test cases", config.output, *counts)
    LOGGER.info("train on them with `python code/own_train.py --root_path %s`", config.output)


if __name__ == "__main__":
    run_script(main, Config)
