"""Your own scans and labels to HDF5 and lists: `python dataloaders/import_nifti.py --help`; see docs/own_data.md."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))  # this checkout's code, whichever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sdcl.runs.config import run_script  # first: from here on Ctrl-C ends without a traceback

# isort: split
from dataloaders.scans.importing import import_cases
from dataloaders.scans.joining import find_cases
from dataloaders.scans.preprocessing import Axis, Normalisation
from sdcl.runs.folder import start_logging


@dataclass
class Config:
    """Import scans (NIfTI, NRRD or DICOM folders) and the labels of some of them (DICOM SEG, too) as a data set.

    They are joined by name, from two folders or by patterns in these, or a table names the files of each case.
    """

    output: Path  # the data set's folder; receives data/, data_split/ and dataset.json
    normalise: tuple[Normalisation, ...]  # zscore or minmax (MRI), ct ([-125, 275] HU to [0, 1]); or one a channel
    images: Path | None = None  # folder of the scans
    labels: Path | None = None  # folder of the labels; a scan without one becomes an unlabelled training case
    image_pattern: str | None = None  # of the scans below --images: "**/*_T1w.nii.gz"; its star names the case
    label_pattern: str | None = None  # of the labels below --labels: "**/*_seg.nii.gz"
    channels: tuple[str, ...] = ()  # of several: what names end with (t1 t2), or {channel} in a pattern stands for
    table: Path | None = None  # instead of these: CSV with the columns case, image, label, patient, split
    patient_pattern: str | None = None  # gives the patient of a name: "(p\d+)_s\d+", "*_s*"; None: BIDS, DICOM, folders
    series: str | None = None  # each patient's DICOM series of this UID, its beginning or description ("T1*")
    layout: Literal["volume", "slices"] = "volume"  # volume: 3D networks; slices: 2D
    slice_axis: Axis | None = None  # x, y or z (patient's) across which slices lie; None: as the scans were sliced
    spacing_mm: tuple[float, float, float] | None = None  # resample to these voxel sides, mm; None: each scan's own
    class_names: tuple[str, ...] = ()  # of the labels 1, 2, ...; empty: class1, class2, ...
    label_values: tuple[int, ...] = ()  # values in the label files that become 1, 2, ...; empty: they are these
    merge: tuple[str, ...] = ()  # values that count as others, before anything else: 5:1 7:1
    ignore: tuple[int, ...] = ()  # values that become background
    test_fraction: float = 0.2  # of the labelled cases, set aside for the test
    val_fraction: float = 0.0  # of the labelled cases, set aside for validation
    test_list: Path | None = None  # names of the test cases, one a line, instead of --test_fraction
    by_index: bool = False  # labels whose headers say nothing (identity) lie on their scans voxel by voxel
    trust: tuple[str, ...] = ()  # CT cases whose label somebody has looked at and found right, or "all"
    resplit: bool = False  # divide the cases anew where an earlier import has; else only new ones are added, to train
    trust_hu: bool = False  # scans are CT in HU though they look otherwise, such as soft tissue alone
    pixel_spacing_mm: tuple[float, float] | None = None  # of DICOM files that do not say it: between rows, columns
    seed: int = 1337  # of the choice of cases
    workers: int = 2  # cases at a time
    overwrite: bool = False  # convert cases that are there, too


def main(config: Config) -> None:
    """Find the cases and import them."""
    start_logging()
    import_cases(config, lambda: find_cases(config))


if __name__ == "__main__":
    run_script(main, Config)
