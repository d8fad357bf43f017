"""LA: the left atrium in contrast-enhanced MRI (2018 Atrial Segmentation Challenge)."""

from pathlib import Path

from dataloaders.checks import inside
from dataloaders.datasets import DataSet
from dataloaders.preprocessing import Preprocessing
from sdcl.errors import UserError

FOLDER = "2018LA_Seg_Training Set"


def path_of(root_path: Path, name: str) -> Path:
    """Return a case's file; see inside()."""
    return inside(root_path / "data" / FOLDER, f"{name}/mri_norm2.h5")


def check_root(root_path: Path) -> None:
    """Refuse a folder that does not hold the data set.

    Raises:
        UserError: says where it looked, what it expected there, and where the data are to be had.
    """
    if not any((root_path / "data" / FOLDER).glob("*/mri_norm2.h5")):
        raise UserError(
            f"no LA data in {root_path.resolve()} (--root_path): expected data/{FOLDER}/<case>/mri_norm2.h5 there, "
            "made from the 2018 Atrial Segmentation Challenge's scans, see docs/data.md; "
            "`python dataloaders/phantom.py --dataset la --root_path <folder>` makes a synthetic set to try."
        )


DATA_SET = DataSet(
    name="la",
    class_names=("LA",),  # left atrium: class 1
    preprocessing=Preprocessing("zscore"),
    path_of=path_of,
    check_root=check_root,
    trained_on_crops=True,
)
