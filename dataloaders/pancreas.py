"""Pancreas: the pancreas in contrast-enhanced CT (Pancreas-CT, The Cancer Imaging Archive)."""

from pathlib import Path

from sdcl.errors import UserError

CLASS_NAMES = ("pancreas",)  # class 1


def path_of(root_path: Path, name: str) -> Path:
    """Return a case's file."""
    return root_path / "data" / f"{name}.h5"


def check_root(root_path: Path) -> None:
    """Refuse a folder that does not hold the data set.

    Raises:
        UserError: says where it looked, what it expected there, and where the data are to be had.
    """
    if not any((root_path / "data").glob("*.h5")):
        raise UserError(
            f"no Pancreas data in {root_path.resolve()} (--root_path): expected data/data0001.h5 and so on there, "
            "made from Pancreas-CT, see Datasets/README.md; "
            "`python dataloaders/phantom.py --dataset pancreas --root_path <folder>` makes a synthetic set to try."
        )
