"""Pancreas: the pancreas in contrast-enhanced CT (Pancreas-CT, The Cancer Imaging Archive)."""

from pathlib import Path

from dataloaders.checks import inside
from dataloaders.datasets import DataSet, Duplicate
from dataloaders.preprocessing import Preprocessing
from sdcl.errors import UserError

LEFT_OUT = (25, 70)  # of the collection's cases
TWICE = Duplicate(
    tuple(f"data{number:04d}" for number in LEFT_OUT),
    "duplicates of other cases, named in no published list; take them out of the lists",
    is_one_enough=True,
)


def path_of(root_path: Path, name: str) -> Path:
    """Return a case's file; see inside()."""
    return inside(root_path / "data", f"{name}.h5")


def check_root(root_path: Path) -> None:
    """Refuse a folder that does not hold the data set.

    Raises:
        UserError: says where it looked, what it expected there, and where the data are to be had.
    """
    if not any((root_path / "data").glob("*.h5")):
        raise UserError(
            f"no Pancreas data in {root_path.resolve()} (--root_path): expected data/data0001.h5 and so on there, "
            "made from Pancreas-CT, see docs/data.md; "
            "`python dataloaders/phantom.py --dataset pancreas --root_path <folder>` makes a synthetic set to try."
        )


DATA_SET = DataSet(
    name="pancreas",
    class_names=("pancreas",),  # class 1
    preprocessing=Preprocessing("ct", spacing_mm=(1.0, 1.0, 1.0)),
    path_of=path_of,
    check_root=check_root,
    trained_on_crops=True,
    is_organ_ct=True,
    duplicates=(TWICE,),
)
