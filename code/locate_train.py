"""Train what finds a structure in whole scans: `python code/locate_train.py --images ... --labels ...`."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code, whichever is installed

from sdcl.runs.config import as_dict, processes, run_script
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER, environment, write_csv
from sdcl.runs.written_files import check_replaceable


@dataclass
class Config:
    """Train a locator: a small V-Net that sees whole scans coarsely and gives the box round a structure.

    `predict.py --roi auto --locator <output>` crops by it, and so can the preprocessing of scans without a label. Each
    fold of the labelled cases is held out once, which says how well new scans are served; then one of all is kept.
    """

    output: Path  # the locator's folder, such as models/locate_la
    normalise: Literal["zscore", "minmax", "ct"]  # zscore or minmax over the scan (MRI); ct: [-125, 275] HU to [0, 1]

    # --- whole scans and their labels ---
    images: Path | None = None  # folder of the scans
    labels: Path | None = None  # folder of the labels; scans without one are left out
    image_pattern: str | None = None  # of the scans below --images: "*/lgemri.nrrd"; its star names the case
    label_pattern: str | None = None  # of the labels below --labels: "*/laendo.nrrd"
    table: Path | None = None  # instead of these: CSV with the columns case, image, label, patient, split
    channels: tuple[str, ...] = ()  # of several: what names end with, as import_nifti.py has it; the first is looked at
    patient_pattern: str | None = None  # gives the patient of a name: "(p\d+)_s\d+", "*_s*"; None: BIDS, DICOM, folders
    series: str | None = None  # each patient's DICOM series of this UID, its beginning or description ("T1*")
    cases: Path | None = None  # names of the cases to learn from, one a line; None: all that have a label
    label_values: tuple[int, ...] = ()  # values in the label files that are the structure; empty: all but 0
    by_index: bool = False  # labels whose headers say nothing (identity) lie on their scans voxel by voxel
    trust: tuple[str, ...] = ()  # CT cases whose label somebody has looked at and found right, or "all"
    trust_hu: bool = False  # scans are CT in HU though they look otherwise, such as soft tissue alone
    pixel_spacing_mm: tuple[float, float] | None = None  # of DICOM files that do not say it: between rows, columns

    # --- the box ---
    spacing_mm: float = 4.0  # side of the coarse voxels
    margin_mm: float = 10.0  # round what is found, as wide as the training crops' margins (LA 10, Pancreas 25)
    least_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)  # sides at least, x y z (LA 70 70 999: z whole; Pancreas 96)
    folds: int = 5  # parts of which each is held out once; 0: none, and nothing says how good the locator is

    # --- training ---
    iterations: int = 200  # of each of the folds' networks, and of the last one
    batch_size: int = 2  # scans in an iteration
    base_lr: float = 3e-3  # Adam's learning rate, which falls to 0
    seed: int = 1337  # of folds, weights and what is drawn

    # --- machine ---
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"  # auto: a CUDA GPU if there is one, else the CPU
    gpu: int = 0  # number of the GPU, from 0
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # of the network
    workers: int = 2  # scans read at a time
    overwrite: bool = False  # replace a locator that is there


def check(config: Config) -> None:
    """Refuse impossible settings before anything is read.

    Raises:
        UserError: names the flag.
    """
    if not 0.5 <= config.spacing_mm <= 50:
        raise UserError(f"--spacing_mm is {config.spacing_mm:g}: a coarse voxel's side must lie within 0.5 and 50 mm.")
    sides = {"margin_mm": (config.margin_mm,), "least_mm": config.least_mm}
    for flag, values in sides.items():
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise UserError(f"--{flag} {' '.join(f'{value:g}' for value in values)} must be lengths in mm, 0 or more.")
    if config.pixel_spacing_mm and not all(0 < side < math.inf for side in config.pixel_spacing_mm):
        raise UserError(f"--pixel_spacing_mm {config.pixel_spacing_mm} must be two numbers above 0.")
    if config.folds < 0 or config.folds == 1:
        raise UserError(f"--folds is {config.folds}: it must be 2 or more, or 0 to hold nothing out.")
    if config.iterations < 1:
        raise UserError(f"--iterations is {config.iterations}: it must be above 0.")
    if (config.output / "config.json").exists():
        raise UserError(f"--output {config.output} is a run's folder: choose another one.")
    if (config.output / "locator.json").exists() and not config.overwrite:
        raise UserError(f"--output {config.output} holds a locator: choose another one, or give --overwrite.")
    check_replaceable(*(config.output / name for name in ("locator.json", "weights.pth", "held_out.csv")))
    if processes() > 1:
        raise UserError("locate_train.py runs in one process: start it without torchrun or further tasks of srun.")


def main(config: Config) -> None:
    """Read the labelled scans, hold each fold out once, train on all, write the locator."""
    check(config)
    from dataloaders.scans import held_out  # these take seconds, which a wrong flag need not wait for
    from dataloaders.scans.joining import find_cases
    from dataloaders.scans.locating import save_locator
    from dataloaders.scans.patients import with_patients
    from sdcl.locating import NETWORK, Sample, train_locator
    from sdcl.runs.experiment import begin

    device = begin(config)
    cases = held_out.read_cases(config, with_patients(find_cases(config), config))
    shapes = [case.seen.array.shape for case in cases]
    sides = "×".join(f"{min(axis)}-{max(axis)}" for axis in zip(*shapes, strict=True))
    LOGGER.info("%d cases of %s voxels of %g mm", len(cases), sides, config.spacing_mm)

    def fit(chosen, title):
        return train_locator([Sample(case.seen.array, case.mask) for case in chosen], config, device, title)

    margin_mm, told = config.margin_mm, {}
    if config.folds:
        judged = held_out.leave_some_out(cases, config, fit)
        told = held_out.summary(judged, config.margin_mm)
        margin_mm = held_out.margin_of(judged, config.margin_mm)
        write_csv(config.output / "held_out.csv", [one.row() for one in judged])
        if margin_mm > config.margin_mm:
            LOGGER.info(
                "NOTE: %g mm was too little for %s; the locator's margin is raised to %g mm, which holds them, but "
                "which no case held out has tested", config.margin_mm,
                ", ".join(one.name for one in judged if one.least_mm is not None and one.least_mm < 0), margin_mm,
            )  # fmt: skip
    else:
        LOGGER.info("NOTE: --folds 0 holds nothing out: nothing says whether new scans' structures are held.")
    facts = held_out.facts_of(cases, config, margin_mm)
    save_locator(
        config.output, facts, fit(cases, "all cases"), NETWORK,
        {"held_out": told, "config": as_dict(config), "environment": environment(device)},
    )  # fmt: skip
    LOGGER.info("written to %s: crop by it with `predict.py --roi auto --locator %s`", config.output, config.output)


if __name__ == "__main__":
    run_script(main, Config)
