"""Cropped 3D training volumes and whole evaluation volumes; what LA and Pancreas share."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import nn

from dataloaders.cache import UNREAD, Cache, Cases, Decoding
from dataloaders.checked import Checked
from dataloaders.checks import check_apart, check_dimensions
from dataloaders.datasets import DataSet, check_classes, texts_of
from dataloaders.files import has_label, read_list, read_sample, with_channels
from dataloaders.streams import Streams
from dataloaders.study import StudyData, texts_in
from dataloaders.transforms import Crop, Cropping, crop_corner, cropped, shift_intensity
from dataloaders.voxel_sides import range_of_files
from sdcl.inference import Slabs, Windows, window_slabs
from sdcl.runs.data import Scoring, Training
from sdcl.runs.errors import UserError
from sdcl.scoring.evaluation import Case, Decision, Task

PLANES = (2, 1, 0)  # axial, coronal, sagittal in the usual order of axes
WIDEST_CONNECTIVITY = 26


class CroppedVolumes:
    """Training volumes, decoded once, cropped at each reading.

    Args:
        paths: the files, by the case's name.
        decoding: how they are decoded, checked and kept.
        cropping: what they go through then.
        checked: see Cache.

    Attributes:
        cache: of the files.

    Raises:
        UserError: a file is missing or wrong.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        decoding: Decoding,
        cropping: Cropping,
        checked: Checked = UNREAD,
    ):
        self._cropping = cropping
        self._names = list(paths)
        what = f"{'labelled' if decoding.labelled else 'unlabelled'} volumes"
        self.cache = Cache(list(paths.values()), what, 3, decoding, checked)

    def __len__(self) -> int:
        """Count the volumes."""
        return len(self.cache)

    @property
    def classes(self) -> set[int]:
        """Return the classes in the labels, background included."""
        return self.cache.classes

    def name(self, index: int) -> str:
        """Return a case's name."""
        return self._names[index]

    def sample(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a crop: image (channels, X, Y, Z) float32 and label (X, Y, Z) uint8, or None without labels."""
        case, how = self.cache[index], self._cropping
        where = crop_corner(case.shape, how.size, rng if how.crop == "random" else None)
        image = cropped(case.image, *where, how.size).astype(np.float32, copy=False)
        label = None if case.label is None else cropped(case.label, *where, how.size)
        return shift_intensity(with_channels(image, 3), how.intensity, rng), label


def read_volumes(
    names: Sequence[str], root_path: Path, data_set: DataSet, spacing: Sequence[float] | None = None
) -> list[Case]:
    """Read whole labelled volumes.

    Args:
        names: cases.
        root_path: the data set's folder.
        data_set: where its files are, its classes, what its labels are checked for.
        spacing: voxel sides in mm; None: each file's own attribute `spacing`, where it has one.

    Raises:
        UserError: a file is missing or wrong.
    """
    cases = []
    for name in names:
        path = data_set.path_of(root_path, name)
        sample = read_sample(
            path, ndim=3, num_classes=data_set.num_classes, channels=data_set.channels, needs_geometry=not spacing
        )
        data_set.check_label(path, sample)
        cases.append(Case(name, sample.image, sample.label, tuple(spacing or ()) or sample.spacing, sample.affine))
    return cases


def split_labelled(train: Sequence[str], labelnum: int, val_cases: int = 0) -> tuple[list[str], list[str], list[str]]:
    """Split the training list into its first cases, labelled, the rest, and the cases held out for validation.

    Args:
        train: case names.
        labelnum: number of labelled cases; at least 2, since two of them are mixed.
        val_cases: how many to hold out, the last of the unlabelled ones.

    Returns:
        Labelled, unlabelled and validation names, in the list's order.

    Raises:
        UserError: the list does not have so many.
    """
    if not 2 <= labelnum <= len(train):
        raise UserError(f"--labelnum is {labelnum}: choose 2 to {len(train)}, the cases of train.txt.")
    rest = list(train[labelnum:])
    if val_cases and val_cases >= len(rest):
        raise UserError(
            f"--val_cases is {val_cases}, but only {len(rest)} training cases are unlabelled: hold out fewer."
        )
    return list(train[:labelnum]), rest[: len(rest) - val_cases], rest[len(rest) - val_cases :]


def check_windows(stride: Sequence[int], patch_size: Sequence[int]) -> None:
    """Refuse a sliding window that does not move, or that leaves gaps.

    Raises:
        UserError: names the flag.
    """
    if any(not 1 <= step <= patch for step, patch in zip(stride, patch_size, strict=True)):
        raise UserError(
            f"--stride is {' '.join(map(str, stride))}: every step must lie between 1 and the window's side, "
            f"{' '.join(map(str, patch_size))} voxels."
        )


def check_3d(config: Any, num_classes: int) -> None:
    """Refuse settings of a 3D data set that contradict each other.

    Raises:
        UserError: names the flags.
    """
    check_dimensions(config, 3)
    for flag in ("pseudo_label_rule", "decision_rule"):
        if getattr(config, flag) == "threshold" and num_classes != 2:
            raise UserError(f"--{flag} threshold is for two classes, not {num_classes}: use argmax.")
    if config.connectivity not in (6, 18, 26):
        raise UserError(f"--connectivity is {config.connectivity}: volumes know 6, 18 or 26 neighbours.")
    check_windows(config.stride, config.patch_size)
    has_list = (config.root_path / "data_split" / "val.txt").exists()
    if config.select == "val" and not (config.val_cases or has_list):
        raise UserError("--select val needs cases to validate on: give --val_cases, or --select last or test.")
    if config.val_cases and has_list:
        raise UserError(f"--val_cases holds out training cases, but {config.root_path} has a val.txt already: use one.")
    if config.select == "test" and config.val_cases:
        raise UserError("--select test and --val_cases contradict each other: give --select val, or no --val_cases.")


class VolumeData(StudyData):
    """A 3D data set with a script's header: trained on crops, scored on whole volumes; see sdcl.runs.data.Data."""

    def check(self) -> None:
        """Refuse settings that contradict each other."""
        check_3d(self._config, self._data_set.num_classes)

    def training(self, needs_unlabelled: bool = True) -> Training:
        """Read and check the lists and volumes; see Data.training().

        What is validated on are the volumes of test.txt for `--select test`, else those of val.txt, else those held out
        by `--val_cases`, maybe none.
        """
        config = self._config
        labelled, unlabelled, scored = self._split(needs_unlabelled)
        checked = self.read_checked()

        def read(names: Sequence[str], crop: Crop, has_labels: bool) -> CroppedVolumes:
            paths = {name: self._path_of(name) for name in names}
            cropping = Cropping(config.patch_size, crop, config.intensity)
            return CroppedVolumes(paths, self._decoding(has_labels), cropping, checked)

        labelled_set = read(labelled, "random", True)
        check_classes(labelled_set.classes, self._data_set)
        second = read(unlabelled, config.unlabelled_crop, False) if config.self_iterations and unlabelled else None
        decoding = replace(self._decoding(True), dtype="float32", needs_geometry=True)
        validation = Cache(list(map(self._path_of, scored)), "volumes to validate on", 3, decoding, checked)
        caches = [labelled_set.cache, *([] if second is None else [second.cache])]
        return Training(
            task=self._task(config.patch_size, config.stride),
            streams=lambda stage: Streams(labelled_set, second if stage == "self_train" else None, config, stage),
            lists={"labelled": labelled, "unlabelled": unlabelled},
            trained_on=[*labelled, *unlabelled],
            validation_cases=Cases(scored, validation),
            validated_on="test" if config.select == "test" else "val",
            facts=self._data_set.facts(
                config.decision_rule,
                texts_in(*caches),
                range_of_files(map(self._path_of, [*labelled, *unlabelled]), config.patch_size),
            ),
            waiting_bytes=sum(cache.waiting_bytes for cache in (*caches, validation)),
            keep=lambda folder: self.keep(folder, checked, [*caches, validation]),
        )

    def scoring(self, trained: dict[str, Any]) -> Scoring:
        """Say what a test scores; see Data.scoring()."""
        config, split = self._config, getattr(self._config, "split", "test")
        check_dimensions(SimpleNamespace(**trained), 3)
        size = trained["patch_size"]
        stride = config.stride or trained["stride"] or [max(side // 2, 1) for side in size]
        check_windows(stride, size)
        names = self._scored(split, trained)
        decision = Decision(config.decision_rule, WIDEST_CONNECTIVITY if config.largest_component else None)
        return Scoring(
            task=replace(self._task(size, stride, config.window_weighting, config.tta), decision=decision),
            read_cases=lambda: read_volumes(names, config.root_path, self._data_set, config.spacing),
            split=split,
            facts=self._data_set.facts(config.decision_rule, texts_of(map(self._path_of, names))),
        )

    def _scored(self, split: str, trained: dict[str, Any]) -> list[str]:
        """Return the names of the cases to score: a list's, or those that the run held out of its training list."""
        lists = self._config.root_path / "data_split"
        if split != "val" or (lists / "val.txt").exists():
            return read_list(lists / f"{split}.txt")
        if not trained.get("val_cases"):
            raise UserError(
                f"--split val: {lists} has no val.txt, and the run held out no training cases (--val_cases): give "
                "--split test."
            )
        return split_labelled(read_list(lists / "train.txt"), trained["labelnum"], trained["val_cases"])[2]

    def _split(self, needs_unlabelled: bool) -> tuple[list[str], list[str], list[str]]:
        """Return the names of the labelled and unlabelled training cases, and of those to validate on, checked."""
        config, lists = self._config, self._config.root_path / "data_split"
        train, test, val = read_list(lists / "train.txt"), lists / "test.txt", lists / "val.txt"
        needed = [path for path in (test, val) if path.exists() or (path, config.select) == (test, "test")]
        others = {path: read_list(path) for path in needed}
        check_apart(train, others, lists / "train.txt")
        labelled, unlabelled, held_out = split_labelled(train, config.labelnum, config.val_cases)
        if not unlabelled and config.self_iterations and needs_unlabelled:
            raise UserError(
                f"--labelnum {config.labelnum} leaves no unlabelled cases: lower it, or give --self_iterations 0 "
                "for supervised pre-training alone."
            )
        bare = [name for name in held_out if not has_label(self._path_of(name))]
        if bare:
            raise UserError(
                f"--val_cases {config.val_cases} holds out {bare[0]}, which has no label to score against: label the "
                "held out cases, or give --select last and no --val_cases."
            )
        return labelled, unlabelled, others[test] if config.select == "test" else others.get(val, held_out)

    def _path_of(self, name: str) -> Path:
        return self._data_set.path_of(self._config.root_path, name)

    def _decoding(self, labelled: bool) -> Decoding:
        config, how = self._config, self._data_set
        return Decoding(how.num_classes, labelled, config.cache_gb, config.cache_dtype, how.check_label, how.channels)

    def _task(self, size: Sequence[int], stride: Sequence[int], *how: Any) -> Task:
        """Return what the data set fixes, predicting by windows of a size and stride; how: see sliding_window()."""
        config, data_set = self._config, self._data_set

        windows = Windows(size, stride, data_set.num_classes, config.window_batch, config.precision, *how)

        def infer(networks: Sequence[nn.Module], volume: np.ndarray) -> Slabs:
            return window_slabs(networks, volume, windows)

        decision = Decision(config.decision_rule)
        return Task(
            data_set.name, data_set.class_names, infer, decision, PLANES, data_set.label_values, data_set.patient_of,
            data_set.channels,
        )  # fmt: skip
