"""ACDC: slices for training, volumes for validation and test."""

from pathlib import Path

from dataloaders.datasets import DataSet, Duplicate
from dataloaders.preprocessing import Preprocessing
from dataloaders.slices import find_file
from sdcl.errors import UserError

LAYOUT = "data/<patient>_<frame>.h5 and data/slices/<patient>_<frame>_slice_<k>.h5"
TWICE = Duplicate(
    ("patient074", "patient076"),
    "the same images, labelled twice: two readings of one heart, whose Dice (RV 0.97, Myo 0.95, LV 0.97) shows how far "
    "readers agree; count them as one patient",
)
SOURCE = "the ACDC challenge's data, see docs/data.md"


def check_root(root_path: Path) -> None:
    """Refuse a folder that does not hold the data set.

    Raises:
        UserError: says where it looked, what it expected there, and where the data are to be had.
    """
    if not any((root_path / "data").glob("**/*.h5")):
        raise UserError(
            f"no ACDC data in {root_path.resolve()} (--root_path): expected {LAYOUT} there, made from {SOURCE}; "
            "`python dataloaders/phantom.py --dataset acdc --root_path <folder>` makes a synthetic set to try."
        )


DATA_SET = DataSet(
    name="acdc",
    class_names=("RV", "Myo", "LV"),  # right ventricle, myocardium, left ventricle: classes 1, 2, 3
    preprocessing=Preprocessing("minmax", "LPS", layout="slices", slice_axis="z"),  # as the challenge's files lie
    path_of=find_file,
    check_root=check_root,
    patient_of=lambda name: name.split("_")[0],  # <patient>_<frame>_slice_<k>
    duplicates=(TWICE,),
)
