"""Single slices for training and volumes of slices for evaluation; what 2D data sets share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import nn

from dataloaders.checks import check_apart, check_dimensions
from dataloaders.datasets import SLICE, DataSet, check_classes, find_file
from dataloaders.files import Cache, read_affine, read_list, read_sample, read_spacing
from dataloaders.streams import Streams
from dataloaders.transforms import apply_index, augmentation_index
from sdcl.inference import slice_wise
from sdcl.runs.errors import UserError
from sdcl.runs.experiment import begin, find_weights, test, train
from sdcl.scoring.evaluation import Case, Decision, Task
from sdcl.training import validation_iterations


def split_by_patients(
    slices: Sequence[str], labelnum: int, patient_of: Callable[[str], str]
) -> tuple[list[str], list[str]]:
    """Split the training slices into those of the first patients, labelled, and the rest.

    Args:
        slices: names `<case>_slice_<k>`, ordered by patient.
        labelnum: number of labelled patients.
        patient_of: maps a slice's name to its patient's.

    Returns:
        Labelled and unlabelled names, in the list's order.

    Raises:
        UserError: the list has fewer patients.
    """
    patients = list(dict.fromkeys(map(patient_of, slices)))
    if not 1 <= labelnum <= len(patients):
        raise UserError(f"--labelnum is {labelnum}: choose 1 to {len(patients)}, the patients of train_slices.list.")
    chosen = set(patients[:labelnum])
    labelled = [name for name in slices if patient_of(name) in chosen]
    return labelled, [name for name in slices if patient_of(name) not in chosen]


class Slices:
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
        self._names = list(names)
        paths = [find_file(root_path, name) for name in names]
        self._cache = Cache(
            paths, what=what, bound_gb=cache_gb, ndim=2, num_classes=num_classes, needs_label=labelled
        )  # fmt: skip

    def __len__(self) -> int:
        """Count the slices."""
        return len(self._cache)

    @property
    def classes(self) -> set[int]:
        """Return the classes in the labels, background included."""
        return self._cache.classes

    def name(self, index: int) -> str:
        """Return a slice's name."""
        return self._names[index]

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
        cases.append(Case(name, sample.image, sample.label, read_spacing(path), read_affine(path)))
    return cases


def check_patients(root_path: Path, slices: Sequence[str], patient_of: Callable[[str], str]) -> None:
    """Refuse training slices of patients whom the lists of validation or test name too.

    Raises:
        UserError: names the list and the first such patient.
    """
    lists = root_path / "data_split"
    held_out = {path: read_list(path) for name in ("val", "test") if (path := lists / f"{name}.list").exists()}
    patients = {path: list(map(patient_of, names)) for path, names in held_out.items()}
    check_apart(list(map(patient_of, slices)), patients, lists / "train_slices.list")


def check_2d(config: Any, num_classes: int) -> None:
    """Refuse settings of a 2D data set that contradict each other.

    Raises:
        UserError: names the flags.
    """
    check_dimensions(config, 2)
    if config.pseudo_label_rule == "threshold" and num_classes != 2:
        raise UserError(f"--pseudo_label_rule threshold is for two classes, not {num_classes}: use argmax.")
    if config.connectivity not in (4, 8):
        raise UserError(f"--connectivity is {config.connectivity}: slices know 4 or 8 neighbours.")


def train_slices(config: Any, data_set: DataSet) -> None:
    """Do what a 2D data set's training script does: read and check the data, train both stages.

    Args:
        config: the script's header.
        data_set: what to train on.

    Raises:
        UserError: a setting, list or file is wrong.
    """

    def check(config: Any) -> None:
        data_set.check_root(config.root_path)
        check_2d(config, data_set.num_classes)

    device = begin(config, check)
    root, num_classes = config.root_path, data_set.num_classes
    slices = read_list(root / "data_split" / "train_slices.list")
    check_patients(root, slices, data_set.patient_of)
    labelled_names, unlabelled_names = split_by_patients(slices, config.labelnum, data_set.patient_of)
    if not unlabelled_names and config.self_iterations:
        raise UserError(
            f"--labelnum {config.labelnum} leaves no unlabelled patients: lower it, or give --self_iterations 0 "
            "for supervised pre-training alone."
        )

    def infer(networks: Sequence[nn.Module], volume: np.ndarray) -> list[np.ndarray]:
        return slice_wise(networks, volume, config.patch_size, num_classes, config.batch_size, config.precision)

    def slices_of(names: Sequence[str], labelled: bool) -> Slices:
        return Slices(
            root, names, size=config.patch_size, num_classes=num_classes, cache_gb=config.cache_gb,
            labelled=labelled, augment_probability=config.augment_probability, max_angle_deg=config.max_angle_deg,
        )  # fmt: skip

    labelled = slices_of(labelled_names, labelled=True)
    check_classes(labelled.classes, data_set)
    unlabelled = slices_of(unlabelled_names, labelled=False) if config.self_iterations else None
    has_val = (root / "data_split" / "val.list").exists() or config.select == "val"
    train(
        config,
        Task(data_set.name, data_set.class_names, infer),
        device,
        make_streams=lambda with_unlabelled: Streams.of(config, labelled, unlabelled if with_unlabelled else None),
        lists={"labelled": labelled_names, "unlabelled": unlabelled_names},
        trained_on=list(dict.fromkeys(name.rsplit(SLICE, 1)[0] for name in (*labelled_names, *unlabelled_names))),
        cases=read_volumes(root, "val", num_classes) if has_val else [],
        validated_on="val",
        pre_val_at=validation_iterations(config.pre_val_from, config.pre_val_every, config.pre_iterations),
        self_val_at=validation_iterations(config.self_val_every, config.self_val_every, config.self_iterations),
        facts=data_set.facts("argmax", [find_file(root, name) for name in (*labelled_names, *unlabelled_names)]),
    )


def test_slices(config: Any, data_set: DataSet) -> None:
    """Do what a 2D data set's test script does: score a run on the volumes of a split; see train_slices()."""
    device = begin(config, lambda config: data_set.check_root(config.root_path))
    folder, trained = find_weights(config, data_set.name)
    check_dimensions(SimpleNamespace(**trained), 2)
    names = read_list(config.root_path / "data_split" / f"{config.split}.list")
    facts = data_set.facts("argmax", [find_file(config.root_path, name) for name in names])

    def infer(networks: Sequence[nn.Module], volume: np.ndarray) -> list[np.ndarray]:
        size = trained["patch_size"]
        return slice_wise(networks, volume, size, data_set.num_classes, config.batch_size, config.precision)

    def read_cases() -> list[Case]:
        return read_volumes(config.root_path, config.split, data_set.num_classes)

    decision = Decision("argmax", 26 if config.largest_component else None)
    task = Task(data_set.name, data_set.class_names, infer, decision, label_values=data_set.label_values)
    test(config, task, device, folder, trained, read_cases, config.split, facts, nifti=config.save_nifti)
