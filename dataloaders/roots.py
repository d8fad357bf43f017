"""Where each data set's files lie, and what is said where there are none; imports nothing that takes time."""

from dataclasses import dataclass
from pathlib import Path

from sdcl.runs.errors import UserError

PHANTOM = "`python dataloaders/phantom.py --dataset {} --root_path <folder>` makes a synthetic set to try"
LA_FOLDER = "2018LA_Seg_Training Set"


@dataclass(frozen=True)
class Root:
    """What a data set's folder holds.

    Attributes:
        title: the data set's name in a sentence.
        pattern: of its files, below data/.
        expected: the files, in words.
        source: what they are made from.
    """

    title: str
    pattern: str
    expected: str
    source: str


ROOTS = {
    "acdc": Root(
        "ACDC", "**/*.h5", "data/<patient>_<frame>.h5 and data/slices/<patient>_<frame>_slice_<k>.h5",
        "the ACDC challenge's data",
    ),
    "la": Root(
        "LA", f"{LA_FOLDER}/*/mri_norm2.h5", f"data/{LA_FOLDER}/<case>/mri_norm2.h5",
        "the 2018 Atrial Segmentation Challenge's scans",
    ),
    "pancreas": Root("Pancreas", "*.h5", "data/data0001.h5 and so on", "Pancreas-CT"),
}  # fmt: skip


def check_root(name: str, root_path: Path) -> None:
    """Refuse a folder that does not hold a data set.

    Args:
        name: "acdc", "la", "pancreas"; any other is a data set of one's own.
        root_path: the folder.

    Raises:
        UserError: says where it looked, what it expected there, and where the data are to be had.
    """
    root = ROOTS.get(name)
    if root is None and not root_path.is_dir():
        raise UserError(f"--root_path {root_path} does not exist: check the path.")
    if root is None:
        if not any((root_path / "data").glob("*.h5")):
            raise UserError(
                f"{root_path.resolve() / 'data'} (--root_path) holds no .h5 files: make them with "
                "`python dataloaders/import_nifti.py --output <folder>`, see docs/own_data.md."
            )
    elif not any((root_path / "data").glob(root.pattern)):
        raise UserError(
            f"no {root.title} data in {root_path.resolve()} (--root_path): expected {root.expected} there, made from "
            f"{root.source}, see docs/data.md; {PHANTOM.format(name)}."
        )
