"""LA: the left atrium in contrast-enhanced MRI (2018 Atrial Segmentation Challenge)."""

from pathlib import Path

from dataloaders.checks import inside
from dataloaders.datasets import DataSet
from dataloaders.roots import LA_FOLDER
from dataloaders.scans.preprocessing import Preprocessing

FOLDER = LA_FOLDER


def path_of(root_path: Path, name: str) -> Path:
    """Return a case's file; see inside()."""
    return inside(root_path / "data" / FOLDER, f"{name}/mri_norm2.h5")


DATA_SET = DataSet(
    name="la",
    files="la",
    class_names=("LA",),  # left atrium: class 1
    preprocessing=Preprocessing("zscore"),
    path_of=path_of,
    trained_on_crops=True,
)
