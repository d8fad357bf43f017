"""ACDC: slices for training, volumes for validation and test."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataloaders.files import Cache, read_list, read_sample, read_spacing
from dataloaders.transforms import apply_index, augmentation_index
from sdcl.errors import UserError
from sdcl.evaluation import Case

CLASS_NAMES = ("RV", "Myo", "LV")  # right ventricle, myocardium, left ventricle: classes 1, 2, 3
LAYOUT = "data/<patient>_<frame>.h5 and data/slices/<patient>_<frame>_slice_<k>.h5"
SOURCE = "the ACDC challenge's data, see Datasets/README.md"


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


def split_by_patients(slices: Sequence[str], labelnum: int) -> tuple[list[str], list[str]]:
    """Split the training slices into those of the first patients, labelled, and the rest.

    Args:
        slices: names `<patient>_<frame>_slice_<k>`, ordered by patient.
        labelnum: number of labelled patients.

    Returns:
        Labelled and unlabelled names, in the list's order.

    Raises:
        UserError: the list has fewer patients.
    """
    patients = list(dict.fromkeys(name.split("_")[0] for name in slices))
    if not 1 <= labelnum <= len(patients):
        raise UserError(f"--labelnum is {labelnum}: choose 1 to {len(patients)}, the patients of train_slices.list.")
    chosen = set(patients[:labelnum])
    labelled = [name for name in slices if name.split("_")[0] in chosen]
    return labelled, [name for name in slices if name.split("_")[0] not in chosen]


def find_file(root_path: Path, name: str) -> Path:
    """Return a slice's or volume's path: in data/slices or data, since public copies keep either in either."""
    folders = [root_path / "data" / "slices", root_path / "data"]
    expected = folders if "_slice_" in name else folders[::-1]
    return next((path for folder in expected if (path := folder / f"{name}.h5").exists()), expected[0] / f"{name}.h5")


class AcdcSlices:
    """Training slices, decoded once, augmented at each reading.

    Args:
        root_path: the data set's folder.
        names: slices to read.
        size: (H, W) of the samples, in pixels.
        num_classes: labels must lie in [0, num_classes).
        cache_gb: bound of the memory for decoded slices, in GiB.
        labelled: without it labels are neither needed nor read.
        augment_probability: see augmentation_index.
        max_angle_deg: see augmentation_index.

    Raises:
        UserError: a file is missing or wrong.
    """

    def __init__(
        self,
        root_path: Path,
        names: Sequence[str],
        *,
        size: tuple[int, int],
        num_classes: int,
        cache_gb: float,
        labelled: bool,
        augment_probability: float = 0.5,
        max_angle_deg: int = 20,
    ):
        self._how = (size, augment_probability, max_angle_deg)
        what = f"{'labelled' if labelled else 'unlabelled'} slices"
        paths = [find_file(root_path, name) for name in names]
        self._cache = Cache(
            paths, what=what, bound_gb=cache_gb, ndim=2, num_classes=num_classes, needs_label=labelled
        )  # fmt: skip

    def __len__(self) -> int:
        """Count the slices."""
        return len(self._cache)

    def sample(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        """Return an augmented slice: image (H, W) float32 and label (H, W) uint8, or None without labels."""
        case = self._cache[index]
        size, probability, max_angle_deg = self._how
        view = augmentation_index(case.image.shape, size, rng, probability, max_angle_deg)
        return apply_index(case.image, view), None if case.label is None else apply_index(case.label, view)


def read_volumes(root_path: Path, split: str, num_classes: int) -> list[Case]:
    """Read the volumes of `val` or `test`.

    Returns:
        Cases of shape (slices, H, W), in the list's order.

    Raises:
        UserError: the list or a file is missing or wrong.
    """
    cases = []
    for name in read_list(root_path / "data_split" / f"{split}.list"):
        path = find_file(root_path, name)
        sample = read_sample(path, ndim=3, num_classes=num_classes)
        cases.append(Case(name, sample.image, sample.label, read_spacing(path)))
    return cases
