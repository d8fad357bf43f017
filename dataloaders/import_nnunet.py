"""An nnU-Net data set to HDF5 and lists: `python dataloaders/import_nnunet.py --help`; see docs/own_data.md."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))  # this checkout's code, whichever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sdcl.runs.config import run_script  # first: from here on Ctrl-C ends without a traceback

# isort: split
from dataloaders.scans.importing import import_cases
from dataloaders.scans.nnunet import DESCRIPTION, find_cases, read_description
from dataloaders.scans.preprocessing import Axis, Normalisation
from sdcl.runs.folder import start_logging


@dataclass
class Config:
    """Import a data set as nnU-Net lays it out: dataset.json, imagesTr, labelsTr, and imagesTs with labelsTs.

    Training images without a label, and those of --unlabelled, become unlabelled training cases. Label names and
    numbers are kept, so that predictions have nnU-Net's.
    """

    dataset: Path  # nnUNet_raw/DatasetXXX_Name
    output: Path  # the data set's folder; receives data/, data_split/ and dataset.json

    # --- cases ---
    unlabelled: Path | None = None  # folder of further images without labels, named as in imagesTr
    splits: Path | None = None  # splits_final.json, whose fold divides the labelled cases; None: drawn anew
    fold: int = 0  # of --splits: its "val" cases are the test, or, where labelsTs is there, the validation
    test_fraction: float = 0.2  # of the labelled cases, set aside for the test, without --splits and labelsTs
    val_fraction: float = 0.0  # of the labelled cases, set aside for validation, without --splits
    seed: int = 1337  # of the choice of cases
    patient_pattern: str | None = None  # gives the patient of a name: "(p\d+)_s\d+", "*_s*"; None: BIDS, DICOM, folders

    # --- preprocessing ---
    normalise: tuple[Normalisation, ...] = ()  # for all channels, or each; empty: ct for "CT", else zscore
    layout: Literal["volume", "slices"] = "volume"  # volume: 3D networks; slices: 2D
    slice_axis: Axis | None = None  # x, y or z (patient's) across which slices lie; None: as the scans were sliced
    spacing_mm: tuple[float, float, float] | None = None  # resample to these voxel sides, mm; None: each scan's own
    trust: tuple[str, ...] = ()  # CT cases whose label somebody has looked at and found right, or "all"
    trust_hu: bool = False  # scans are CT in HU though they look otherwise, such as soft tissue alone

    # --- how ---
    resplit: bool = False  # divide the cases anew where an earlier import has; else only new ones are added, to train
    workers: int = 2  # cases at a time
    overwrite: bool = False  # convert cases that are there, too


def main(config: Config) -> None:
    """Read the description, find the cases and import them."""
    start_logging()
    described = read_description(config.dataset)
    fixed = {
        "images": config.dataset, "labels": config.dataset, "table": None, "by_index": False, "test_list": None,
        "pixel_spacing_mm": None, "merge": (), "ignore": (), "class_names": described.class_names,
        "label_values": described.label_values, "channels": described.channels,
        "normalise": config.normalise or described.normalise,
        "described_by": config.dataset / DESCRIPTION,
    }  # fmt: skip
    settings = SimpleNamespace(**(vars(config) | fixed))
    import_cases(settings, lambda: find_cases(described, config))


if __name__ == "__main__":
    run_script(main, Config)
