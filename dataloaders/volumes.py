"""Cropped 3D training volumes and whole evaluation volumes; what LA and Pancreas share."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from torch import nn

from dataloaders.checks import check_apart, check_dimensions
from dataloaders.datasets import DataSet, check_classes
from dataloaders.files import Cache, Sample, has_label, read_affine, read_list, read_sample, read_spacing
from dataloaders.streams import Streams
from sdcl.inference import sliding_window
from sdcl.runs.errors import UserError
from sdcl.runs.experiment import begin, find_weights, test, train
from sdcl.scoring.evaluation import Case, Decision, Task
from sdcl.training import validation_iterations

Crop = Literal["random", "centre"]
PLANES = (2, 1, 0)  # axial, coronal, sagittal in the usual order of axes
WIDEST_CONNECTIVITY = 26


def crop_corner(
    shape: Sequence[int], patch_size: Sequence[int], rng: np.random.Generator | None
) -> tuple[list[int], list[int]]:
    """Choose where a crop lies, as published.

    Where a side is no longer than the patch's, both of its ends are first padded by (patch - side) // 2 + 1.

    Args:
        shape: the volume's sides, in voxels.
        patch_size: the crop's sides, in voxels.
        rng: None takes the centre crop.

    Returns:
        The padding of both ends of each axis, and the crop's corner in the padded volume, uniform over
        [0, side - patch) for a random crop, round((side - patch) / 2) for the centre.

    Source: docs/method.md, "Order of the data", random crop and centre crop.
    """
    sides = list(zip(shape, patch_size, strict=True))
    is_small = any(side <= patch for side, patch in sides)
    pads = [max((patch - side) // 2 + 1, 0) if is_small else 0 for side, patch in sides]
    rooms = [side + 2 * pad - patch for (side, patch), pad in zip(sides, pads, strict=True)]
    corner = [round(room / 2) if rng is None else int(rng.integers(room)) for room in rooms]
    return pads, corner


def cropped(array: np.ndarray, pads: Sequence[int], corner: Sequence[int], patch_size: Sequence[int]) -> np.ndarray:
    """Return the crop of crop_corner(); what lies outside the volume is 0."""
    result = np.zeros(tuple(patch_size), array.dtype)
    source, target = [], []
    for pad, start, patch, side in zip(pads, corner, patch_size, array.shape, strict=True):
        begin, end = max(start - pad, 0), min(start - pad + patch, side)
        source.append(slice(begin, end))
        target.append(slice(begin - (start - pad), end - (start - pad)))
    result[tuple(target)] = array[tuple(source)]
    return result


class CroppedVolumes:
    """Training volumes, decoded once, cropped at each reading.

    Args:
        paths: the files, by the case's name.
        patch_size: sides of the samples, in voxels.
        crop: "random" or "centre".
        num_classes: labels must lie in [0, num_classes).
        cache_gb: bound of the memory for decoded volumes, in GiB.
        cache_dtype: "float32", or "float16" for half the memory at 3 decimal digits.
        labelled: without it labels are neither needed nor read.
        check: what else to refuse of a labelled file; raises UserError.

    Raises:
        UserError: a file is missing or wrong.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        *,
        patch_size: Sequence[int],
        crop: Crop,
        num_classes: int,
        cache_gb: float,
        cache_dtype: Literal["float32", "float16"],
        labelled: bool,
        check: Callable[[Path, Sample], None] | None = None,
    ):
        self._patch_size, self._crop = tuple(patch_size), crop
        self._names = list(paths)
        self._cache = Cache(
            list(paths.values()),
            what=f"{'labelled' if labelled else 'unlabelled'} volumes",
            bound_gb=cache_gb,
            ndim=3,
            num_classes=num_classes,
            needs_label=labelled,
            dtype=cache_dtype,
            check=check,
        )

    def __len__(self) -> int:
        """Count the volumes."""
        return len(self._cache)

    @property
    def classes(self) -> set[int]:
        """Return the classes in the labels, background included."""
        return self._cache.classes

    def name(self, index: int) -> str:
        """Return a case's name."""
        return self._names[index]

    def sample(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a crop: image (X, Y, Z) float32 and label (X, Y, Z) uint8, or None without labels."""
        case = self._cache[index]
        where = crop_corner(case.image.shape, self._patch_size, rng if self._crop == "random" else None)
        image = cropped(case.image, *where, self._patch_size).astype(np.float32, copy=False)
        return image, None if case.label is None else cropped(case.label, *where, self._patch_size)


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
        sample = read_sample(path, ndim=3, num_classes=data_set.num_classes)
        data_set.check_label(path, sample)
        sides = tuple(spacing) if spacing else read_spacing(path)
        cases.append(Case(name, sample.image, sample.label, sides, None if spacing else read_affine(path)))
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


def train_volumes(config: Any, data_set: DataSet, self_val_at: Collection[int]) -> None:
    """Do what the training scripts of 3D data sets do: read and check the data, train both stages.

    Args:
        config: the script's header.
        data_set: what to train on.
        self_val_at: iterations of self-training after which to validate, beside the last.

    Raises:
        UserError: a setting, list or file is wrong.
    """

    def check(config: Any) -> None:
        data_set.check_root(config.root_path)
        check_3d(config, data_set.num_classes)

    device = begin(config, check)
    num_classes = data_set.num_classes

    def infer(networks: Sequence[nn.Module], volume: np.ndarray) -> list[np.ndarray]:
        return sliding_window(
            networks, volume, config.patch_size, config.stride, num_classes, config.window_batch, config.precision
        )

    make_streams, lists, cases, facts = _training_data(config, data_set)
    train(
        config,
        Task(data_set.name, data_set.class_names, infer, Decision(config.decision_rule), PLANES, data_set.label_values),
        device,
        make_streams=make_streams,
        lists=lists,
        trained_on=[name for names in lists.values() for name in names],
        cases=cases,
        validated_on="test" if config.select == "test" else "val",
        pre_val_at=validation_iterations(config.pre_val_every, config.pre_val_every, config.pre_iterations),
        self_val_at=self_val_at,
        facts=facts,
    )


def test_volumes(config: Any, data_set: DataSet, split: str = "test") -> None:
    """Do what the test scripts of 3D data sets do: score a run on the cases of a split's list; see train_volumes()."""
    device = begin(config, lambda config: data_set.check_root(config.root_path))
    folder, trained = find_weights(config, data_set.name)
    check_dimensions(SimpleNamespace(**trained), 3)
    stride = config.stride or trained["stride"] or [max(side // 2, 1) for side in trained["patch_size"]]
    check_windows(stride, trained["patch_size"])
    num_classes = data_set.num_classes

    def infer(networks: Sequence[nn.Module], volume: np.ndarray) -> list[np.ndarray]:
        return sliding_window(
            networks, volume, trained["patch_size"], stride, num_classes, config.window_batch,
            config.precision, config.window_weighting, config.tta,
        )  # fmt: skip

    names = read_list(config.root_path / "data_split" / f"{split}.txt")
    facts = data_set.facts(config.decision_rule, [data_set.path_of(config.root_path, name) for name in names])

    def read_cases() -> list[Case]:
        return read_volumes(names, config.root_path, data_set, config.spacing)

    decision = Decision(config.decision_rule, WIDEST_CONNECTIVITY if config.largest_component else None)
    task = Task(data_set.name, data_set.class_names, infer, decision, PLANES, data_set.label_values)
    test(config, task, device, folder, trained, read_cases, split, facts, nifti=config.save_nifti)


def _training_data(
    config: Any, data_set: DataSet
) -> tuple[Callable[[bool], Streams], dict[str, list[str]], list[Case], dict[str, Any]]:
    """Read what a run on a 3D data set needs, and check it all.

    Args:
        config: the training script's header.
        data_set: what to train on.

    Returns:
        What makes the streams of pre-training (False) and of self-training (True); the names of both kinds of cases;
        the volumes to validate on: those of test.txt for `--select test`, else those of val.txt, else those held out by
        `--val_cases`, maybe none; and what config.json keeps of the data set.

    Raises:
        UserError: a list or file is missing or wrong.
    """
    root, lists = config.root_path, config.root_path / "data_split"
    train, test, val = read_list(lists / "train.txt"), lists / "test.txt", lists / "val.txt"
    others = {path: read_list(path) for path in (test, val) if path.exists() or (path, config.select) == (test, "test")}
    check_apart(train, others, lists / "train.txt")
    labelled, unlabelled, held_out = split_labelled(train, config.labelnum, config.val_cases)
    if not unlabelled and config.self_iterations:
        raise UserError(
            f"--labelnum {config.labelnum} leaves no unlabelled cases: lower it, or give --self_iterations 0 "
            "for supervised pre-training alone."
        )

    def volumes(names: Sequence[str], crop: Crop, has_labels: bool) -> CroppedVolumes:
        return CroppedVolumes(
            {name: data_set.path_of(root, name) for name in names}, patch_size=config.patch_size, crop=crop,
            num_classes=data_set.num_classes, cache_gb=config.cache_gb, cache_dtype=config.cache_dtype,
            labelled=has_labels, check=data_set.check_label,
        )  # fmt: skip

    labelled_set = volumes(labelled, "random", True)
    check_classes(labelled_set.classes, data_set)
    unlabelled_set = volumes(unlabelled, config.unlabelled_crop, False) if config.self_iterations else None

    def make_streams(with_unlabelled: bool) -> Streams:
        return Streams.of(config, labelled_set, unlabelled_set if with_unlabelled else None)

    used = labelled + (unlabelled if config.self_iterations else [])
    facts = data_set.facts(config.decision_rule, [data_set.path_of(root, name) for name in used])
    scored = others[test] if config.select == "test" else others.get(val, held_out)
    names = {"labelled": labelled, "unlabelled": unlabelled}
    bare = [name for name in held_out if not has_label(data_set.path_of(root, name))]
    if bare:
        raise UserError(
            f"--val_cases {config.val_cases} holds out {bare[0]}, which has no label to score against: label the held "
            "out cases, or give --select last and no --val_cases."
        )
    return make_streams, names, read_volumes(scored, root, data_set), facts
