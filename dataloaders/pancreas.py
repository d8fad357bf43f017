"""Pancreas: the pancreas in contrast-enhanced CT (Pancreas-CT, The Cancer Imaging Archive)."""

from pathlib import Path

from dataloaders.checks import inside
from dataloaders.datasets import DataSet, Duplicate
from dataloaders.scans.preprocessing import Preprocessing

LEFT_OUT = (25, 70)  # of the collection's cases
TWICE = Duplicate(
    tuple(f"data{number:04d}" for number in LEFT_OUT),
    "duplicates of other cases, named in no published list; take them out of the lists",
    is_one_enough=True,
)


def path_of(root_path: Path, name: str) -> Path:
    """Return a case's file; see inside()."""
    return inside(root_path / "data", f"{name}.h5")


DATA_SET = DataSet(
    name="pancreas",
    files="pancreas",
    class_names=("pancreas",),  # class 1
    preprocessing=Preprocessing("ct", spacing_mm=(1.0, 1.0, 1.0)),
    path_of=path_of,
    trained_on_crops=True,
    is_organ_ct=True,
    duplicates=(TWICE,),
)
