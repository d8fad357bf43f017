"""Single slices for training and volumes of slices for evaluation; what 2D data sets share."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import nn

from dataloaders.cache import UNREAD, Cache, Cases, Decoding
from dataloaders.checked import Checked
from dataloaders.checks import check_apart, check_dimensions
from dataloaders.datasets import SLICE, DataSet, check_classes, find_file, texts_of
from dataloaders.files import read_list, read_sample, with_channels
from dataloaders.streams import Streams
from dataloaders.study import StudyData, texts_in
from dataloaders.transforms import Augmentation, apply_index, augmentation_index, shift_intensity
from dataloaders.voxel_sides import range_of_files
from sdcl.inference import Slabs, slice_slabs
from sdcl.runs.data import Scoring, Training
from sdcl.runs.errors import UserError
from sdcl.scoring.evaluation import Case, Decision, Task


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
        decoding: how their files are decoded, checked and kept.
        augmentation: what they go through then.
        checked: see Cache.

    Attributes:
        cache: of the files.

    Raises:
        UserError: a file is missing or wrong.
    """

    def __init__(
        self,
        root_path: Path,
        names: Sequence[str],
        decoding: Decoding,
        augmentation: Augmentation,
        checked: Checked = UNREAD,
    ):
        self._augmentation, self._names = augmentation, list(names)
        what = f"{'labelled' if decoding.labelled else 'unlabelled'} slices"
        self.cache = Cache([find_file(root_path, name) for name in names], what, 2, decoding, checked)

    def __len__(self) -> int:
        """Count the slices."""
        return len(self.cache)

    @property
    def classes(self) -> set[int]:
        """Return the classes in the labels, background included."""
        return self.cache.classes

    def name(self, index: int) -> str:
        """Return a slice's name."""
        return self._names[index]

    def sample(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        """Return an augmented slice: image (channels, H, W) float32 and label (H, W) uint8, or None without labels."""
        case = self.cache[index]
        view = augmentation_index(case.shape, self._augmentation, rng)
        label = None if case.label is None else apply_index(case.label, view)
        image = with_channels(apply_index(case.image, view), 2)
        return shift_intensity(image, self._augmentation.intensity, rng), label


def read_volumes(root_path: Path, split: str, data_set: DataSet) -> list[Case]:
    """Read the volumes of `val` or `test`.

    Returns:
        Cases of shape (slices, H, W), or (channels, slices, H, W), in the list's order.

    Raises:
        UserError: the list or a file is missing or wrong.
    """
    cases = []
    for name in read_list(root_path / "data_split" / f"{split}.list"):
        path = find_file(root_path, name)
        sample = read_sample(
            path, ndim=3, num_classes=data_set.num_classes, channels=data_set.channels, needs_geometry=True
        )
        cases.append(Case(name, sample.image, sample.label, sample.spacing, sample.affine))
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


class SliceData(StudyData):
    """A 2D data set with a script's header: trained on slices, scored on volumes; see sdcl.runs.data.Data."""

    def check(self) -> None:
        """Refuse settings that contradict each other."""
        check_2d(self._config, self._data_set.num_classes)

    def training(self, needs_unlabelled: bool = True) -> Training:
        """Read and check the lists and slices; see Data.training()."""
        config, root = self._config, self._config.root_path
        slices = read_list(root / "data_split" / "train_slices.list")
        check_patients(root, slices, self._data_set.patient_of)
        names = split_by_patients(slices, config.labelnum, self._data_set.patient_of)
        if not names[1] and config.self_iterations and needs_unlabelled:
            raise UserError(
                f"--labelnum {config.labelnum} leaves no unlabelled patients: lower it, or give --self_iterations 0 "
                "for supervised pre-training alone."
            )
        checked = self.read_checked()
        labelled = self._slices(names[0], True, checked)
        check_classes(labelled.classes, self._data_set)
        unlabelled = self._slices(names[1], False, checked) if config.self_iterations and names[1] else None
        used = [*names[0], *names[1]]
        has_val = (root / "data_split" / "val.list").exists() or config.select == "val"
        val_names = read_list(root / "data_split" / "val.list") if has_val else []
        validation = self._volumes(val_names, checked)
        caches = [labelled.cache, *([] if unlabelled is None else [unlabelled.cache])]
        trained_on = list(dict.fromkeys(name.rsplit(SLICE, 1)[0] for name in used))
        volumes = [self._path_of(name) for name in trained_on]  # public copies may lack those of training
        return Training(
            task=self._task(config.patch_size),
            streams=lambda stage: Streams(labelled, unlabelled if stage == "self_train" else None, config, stage),
            lists={"labelled": names[0], "unlabelled": names[1]},
            trained_on=trained_on,
            validation_cases=Cases(val_names, validation),
            validated_on="val",
            facts=self._data_set.facts("argmax", texts_in(*caches), range_of_files(volumes, config.patch_size)),
            waiting_bytes=sum(cache.waiting_bytes for cache in (*caches, validation)),
            keep=lambda folder: self.keep(folder, checked, [*caches, validation]),
        )

    def scoring(self, trained: dict[str, Any]) -> Scoring:
        """Say what a test scores; see Data.scoring()."""
        check_dimensions(SimpleNamespace(**trained), 2)
        root, split = self._config.root_path, self._config.split
        decision = Decision("argmax", 26 if self._config.largest_component else None)
        names = read_list(root / "data_split" / f"{split}.list")
        return Scoring(
            task=replace(self._task(trained["patch_size"]), decision=decision),
            read_cases=lambda: read_volumes(root, split, self._data_set),
            split=split,
            facts=self._data_set.facts("argmax", texts_of(map(self._path_of, names))),
        )

    def _slices(self, names: Sequence[str], labelled: bool, checked: Checked) -> Slices:
        config = self._config
        decoding = Decoding(self._data_set.num_classes, labelled, config.cache_gb, channels=self._data_set.channels)
        augmentation = Augmentation(
            config.patch_size, config.augment_probability, config.max_angle_deg, config.intensity
        )
        return Slices(config.root_path, names, decoding, augmentation, checked)

    def _volumes(self, names: Sequence[str], checked: Checked) -> Cache:
        how = self._data_set
        decoding = Decoding(how.num_classes, True, self._config.cache_gb, channels=how.channels, needs_geometry=True)
        return Cache([self._path_of(name) for name in names], "volumes to validate on", 3, decoding, checked)

    def _path_of(self, name: str) -> Path:
        return find_file(self._config.root_path, name)

    def _task(self, size: Sequence[int]) -> Task:
        """Return what the data set fixes, predicting at a size (H, W) of the networks' input."""
        config, data_set = self._config, self._data_set

        def infer(networks: Sequence[nn.Module], volume: np.ndarray) -> Slabs:
            return slice_slabs(networks, volume, size, data_set.num_classes, config.batch_size, config.precision)

        return Task(
            data_set.name, data_set.class_names, infer,
            label_values=data_set.label_values, patient_of=data_set.patient_of, channels=data_set.channels,
        )  # fmt: skip
