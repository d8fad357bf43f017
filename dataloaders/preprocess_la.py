"""LA: from the challenge's NRRD files to HDF5: `python dataloaders/preprocess_la.py --raw <folder>`."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))  # this checkout's code, whichever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sdcl.runs.config import run_script  # first: from here on Ctrl-C ends without a traceback

# isort: split
import numpy as np

from dataloaders.checks import name_fault
from dataloaders.files import sample_rng
from dataloaders.la import DATA_SET, FOLDER
from dataloaders.scans.convert import Job, Origin, convert, few, provenance, write_case
from dataloaders.scans.preprocessing import at_least, label_box, prepare, prepare_label, with_margins
from dataloaders.scans.reading import SUFFIXES, Scan, aligned_label, label_by_index, read_label, read_scan
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER, start_logging

if TYPE_CHECKING:
    from dataloaders.scans.unlabelled import Cropping

ROOT = Path(__file__).resolve().parents[1]
PREPROCESSING = DATA_SET.preprocessing
RULE = "published"
IMAGE, LABEL = "lgemri", "laendo"


@dataclass
class Config:
    """Convert the scans of the 2018 Atrial Segmentation Challenge, <case>/lgemri.nrrd and <case>/laendo.nrrd."""

    raw: Path  # folder that holds the cases' folders, at any depth
    root_path: Path = ROOT / "Datasets" / "la"  # the data set's folder; its data/ receives the files
    seed: int = 1337  # of the margins
    min_side: int = 112  # voxels in x and y that a crop holds, where the scan has them
    margin: tuple[int, int] = (10, 20)  # voxels beyond that on each side, drawn from [first, second)
    by_index: bool = False  # lay labels on by index, whatever their headers say
    locator: Path | None = None  # of code/locate_train.py: crops the cases without a label; None: they are refused
    workers: int = 2  # cases at a time; each takes up to 2 GiB
    overwrite: bool = False  # convert cases that are there, too


def convert_case(image_path: Path, label_path: Path, target: Path, config: Config) -> None:
    """Normalise the whole scan, crop x and y around the label, and write the case."""
    image, label = read_scan(image_path), read_label(label_path)
    values = np.unique(label.array)
    if len(values) > 2:
        raise UserError(f"{label_path} holds the labels {values.tolist()}, it must hold the atrium alone: correct it.")
    lay = label_by_index if config.by_index else aligned_label
    atrium = lay(image, Scan(label_path, (label.array > 0).astype(np.uint8), label.affine))
    prepared, mask = prepare(image, PREPROCESSING), prepare_label(atrium, image, PREPROCESSING)
    draw = sample_rng(config.seed, target.parent.name).integers(*config.margin, size=(2, 2))
    box = at_least(label_box(mask), (config.min_side, config.min_side, 0), mask.shape)
    box = with_margins(box, [*draw.tolist(), (0, 0)], mask.shape)
    box = (*box[:2], (0, mask.shape[2]))  # z is never cropped
    case = prepared.cropped(box)
    attributes = provenance(case, PREPROCESSING, Origin(RULE, config.raw, (image_path,), label_path), box)
    attributes["crop"] = crop_of(config)
    write_case(target, case.array, mask[tuple(slice(*side) for side in box)], attributes)


def convert_unlabelled(image_path: Path, target: Path, config: Config, cropping: "Cropping") -> None:
    """Normalise the whole scan, crop it round what the locator finds, and write the case without a label."""
    origin = Origin(RULE, config.raw, (image_path,), None)
    cropping.convert(read_scan(image_path), PREPROCESSING, origin, target)


def crop_of(config: Config) -> str:
    """Return what chooses the crops, as the files' attributes keep it."""
    return json.dumps({"seed": config.seed, "min_side": config.min_side, "margin": list(config.margin)})


def main(config: Config) -> None:
    """Find the cases and convert them."""
    if not 0 <= config.margin[0] < config.margin[1]:
        raise UserError(f"--margin is {config.margin[0]} {config.margin[1]}: the first must be less than the second.")
    images = {path.parent: path for suffix in SUFFIXES for path in sorted(config.raw.glob(f"**/{IMAGE}{suffix}"))}
    if not images:
        raise UserError(f"--raw {config.raw} holds no <case>/{IMAGE}.nrrd at any depth: give the challenge's folder.")
    start_logging()
    labels = {path.parent for suffix in SUFFIXES for path in config.raw.glob(f"**/{LABEL}{suffix}")}
    alone = sorted(folder.name for folder in labels - set(images))
    if alone:
        LOGGER.info("labels without a scan (%s), left out: %s", IMAGE, few(alone))
    cropping = None
    if config.locator is not None:
        from dataloaders.scans.unlabelled import WHOLE, Cropping, tell_unlabelled  # with PyTorch, for it alone

        cropping = Cropping.of(config.locator, (config.min_side, config.min_side, WHOLE))  # z is never cropped
    jobs = []
    for folder, image in images.items():
        expected = None if cropping else folder / f"{LABEL}.nrrd"
        label = next((path for s in SUFFIXES if (path := folder / f"{LABEL}{s}").exists()), expected)
        if name_fault(folder.name):
            raise UserError(f"{folder} cannot give a case its name ({name_fault(folder.name)}): rename the folder.")
        target = DATA_SET.path_of(config.root_path, folder.name)
        if any(target in job.targets for job in jobs):
            raise UserError(f"--raw {config.raw} holds the case {folder.name} twice: remove one of them.")
        run = lambda i=image, m=label, t=target: convert_case(i, m, t, config)  # noqa: E731
        if label is None:
            run = lambda i=image, t=target: convert_unlabelled(i, t, config, cropping)  # noqa: E731
        crop = cropping.rule if label is None else crop_of(config)
        made_by = {"rule": RULE, "preprocessing": PREPROCESSING.to_json(), "crop": crop}
        jobs.append(Job(folder.name, [target], run, (image,), label, made_by))
    there = (config.root_path / "data" / FOLDER).glob("*/mri_norm2.h5")
    convert(jobs, config.workers, config.overwrite, there)
    if cropping:
        tell_unlabelled([job.name for job in jobs if job.label is None], config.root_path)


if __name__ == "__main__":
    run_script(main, Config)
