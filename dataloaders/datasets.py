"""What a data set is to the scripts: names, files, preprocessing, and what its labels are checked for."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.checks import inside
from dataloaders.files import Sample, read_text_attributes, with_channels
from dataloaders.roots import check_root
from dataloaders.scans.alignment import TRUSTED, check_alignment
from dataloaders.scans.preprocessing import AXES, WINDOW_HU, Preprocessing
from dataloaders.voxel_sides import SideRange
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

SLICE = "_slice_"  # in a slice's name, before its number
Texts = tuple[str | None, ...]  # a file's attributes `preprocessing` and `orientation`, None for one that it lacks


def find_file(root_path: Path, name: str) -> Path:
    """Return a slice's or volume's path: in data/slices or data, since public copies keep either in either."""
    data, file = root_path / "data", f"{name}.h5"
    expected, other = (data / "slices", data) if SLICE in name else (data, data / "slices")
    is_elsewhere = not (expected / file).exists() and (other / file).exists()
    return inside(other if is_elsewhere else expected, file)


@dataclass(frozen=True)
class Duplicate:
    """Patients whose images are known to be the same, a fault of the collection itself.

    Attributes:
        patients: as patient_of() names them.
        remark: what to make of it, in one sentence.
        is_one_enough: the lists should have none of them, not only not both.
    """

    patients: tuple[str, ...]
    remark: str
    is_one_enough: bool = False


@dataclass(frozen=True)
class DataSet:
    """What differs between data sets.

    Attributes:
        name: in a run folder's name.
        class_names: of the foreground classes 1 to C - 1.
        preprocessing: of files that do not say their own.
        path_of: maps the data set's folder and a case's name to its file.
        files: whose layout the folder has, as roots.ROOTS names them; "own": what import_nifti.py writes.
        is_organ_ct: labels are an organ's in CT, which lies on soft tissue.
        trained_on_crops: its files are cropped around the label.
        patient_of: maps a slice's name to its patient's, in 2D.
        label_values: the classes 1 to C - 1 in the original label files; empty: the same.
        duplicates: that the collection is known to hold.
    """

    name: str
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    path_of: Callable[[Path, str], Path]
    files: str = "own"
    is_organ_ct: bool = False
    trained_on_crops: bool = False
    patient_of: Callable[[str], str] = lambda name: name.rsplit(SLICE, 1)[0]
    label_values: tuple[int, ...] = ()
    duplicates: tuple[Duplicate, ...] = ()

    def check_root(self, root_path: Path) -> None:
        """Refuse a folder that does not hold the data set; see roots.check_root()."""
        check_root(self.files, root_path)

    @property
    def num_classes(self) -> int:
        """Count the classes, background included."""
        return len(self.class_names) + 1

    @property
    def channels(self) -> tuple[str, ...]:
        """Return the names of the images' channels; empty: one, which needs no name."""
        return self.preprocessing.channels

    def check_label(self, path: Path, sample: Sample) -> None:
        """Refuse a CT's label that lies better flipped, unless its file's attribute `alignment` says "trusted".

        Raises:
            UserError: see check_alignment().
        """
        rules = self.preprocessing.rules
        if "ct" not in rules or sample.label is None or not sample.label.any():
            return
        if sample.label.ndim != 3:  # of a slice; its volume was checked when it was made
            return
        if read_text_attributes(path, "alignment")[0] == TRUSTED:
            return
        low, high = WINDOW_HU
        way_out = f'set the file\'s attribute `alignment` to "{TRUSTED}"'
        channel = with_channels(sample.image, 3)[rules.index("ct")]
        hu = channel.astype(np.float32) * (high - low) + low
        check_alignment(path, hu, sample.label, is_organ_ct=self.is_organ_ct, way_out=way_out)

    def preprocessing_of(self, files: Mapping[Path, Texts]) -> Preprocessing:
        """Return how files were preprocessed, and where their axes point, by their attributes.

        Files without attributes were made elsewhere: this data set's usual way is assumed.

        Args:
            files: the attributes `preprocessing` and `orientation` of each.

        Raises:
            UserError: they were preprocessed or lie differently, or an attribute cannot be read.
        """
        found: dict[Preprocessing | None, Path] = {}
        axes: dict[str, Path] = {}
        parsed: dict[str | None, Preprocessing | None] = {None: None}  # of the few texts that there are
        volumes: dict[Path, str] = {}
        for path, (text, orientation) in files.items():
            if text not in parsed:
                parsed[text] = _parsed(path, text)
            found.setdefault(parsed[text], path)
            if text is not None:
                axes.setdefault(orientation or _orientation_of_volume(path, volumes), path)
        if len(found) > 1:
            (how, first), (other, second), *_ = found.items()
            raise UserError(
                f"{first} and {second} were preprocessed differently ({_text(how)} and {_text(other)}): "
                "convert all alike."
            )
        (how,) = found
        return self.preprocessing if how is None else _with_axes(how, axes)

    def facts(self, decision_rule: str, files: Mapping[Path, Texts], sides: SideRange | None = None) -> dict[str, Any]:
        """Return what a run's config.json keeps of the data set, for prediction.

        Args:
            decision_rule: how probabilities become labels.
            files: see preprocessing_of().
            sides: voxel sides of the training cases, as the networks see them; None: not known.
        """
        how = self.preprocessing_of(files)
        known = {} if sides is None else {"voxel_sides_mm": asdict(sides)}
        return known | {
            "name": self.name,
            "class_names": list(self.class_names),
            "label_values": list(self.label_values or range(1, self.num_classes)),
            "decision_rule": decision_rule,
            "trained_on_crops": self.trained_on_crops,
            "preprocessing": json.loads(how.to_json()),
        }


def missing_classes(labels: Iterable[np.ndarray | Iterable[int]], data_set: DataSet) -> list[str]:
    """Name the classes that no label has.

    Args:
        labels: label maps (*S), or the sets of the classes in them; nothing is learned of a class in none.
        data_set: names the classes.
    """
    there: set[int] = set()
    for label in labels:
        there.update(np.unique(label).tolist() if isinstance(label, np.ndarray) else label)
    return [name for k, name in enumerate(data_set.class_names, start=1) if k not in there]


def check_classes(classes: Iterable[int], data_set: DataSet) -> None:
    """Tell of the classes that no labelled training case has, which no training can learn.

    Args:
        classes: those in the labelled cases, background included.
        data_set: names them.

    Raises:
        UserError: there is none but the background.
    """
    missing = missing_classes([classes], data_set)
    if len(missing) == len(data_set.class_names):
        raise UserError(
            f"no labelled training case has any of the classes {', '.join(missing)}, all their labels are empty: give "
            "labels with these structures, or other labelled cases (--labelnum takes the first of the list)."
        )
    if missing:
        LOGGER.warning(
            "WARNING: no labelled training case has the class %s: it cannot be learned, and its Dice will be 0.",
            ", ".join(missing),
        )


def _parsed(path: Path, text: str) -> Preprocessing:
    try:
        return Preprocessing.from_dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: the attribute `preprocessing` cannot be read ({error}): convert it again.") from None


def _text(how: Preprocessing | None) -> str:
    return "not known how" if how is None else how.to_json()


def texts_of(paths: Iterable[Path]) -> dict[Path, Texts]:
    """Read what preprocessing_of() needs of files."""
    return {path: read_text_attributes(path, "preprocessing", "orientation") for path in paths}


def _orientation_of_volume(path: Path, known: dict[Path, str]) -> str:
    """Return the orientation of a slice's volume, where it lies; slices made earlier do not have their own."""
    volume = f"{path.stem.rsplit(SLICE, 1)[0]}.h5"
    if path.with_name(volume) not in known:
        folders = (path.parents[1], path.parent) if SLICE in path.stem else ()
        there = [folder / volume for folder in folders if (folder / volume).exists()]
        orientation = read_text_attributes(there[0], "orientation")[0] if there else None
        known[path.with_name(volume)] = orientation or ""
    return known[path.with_name(volume)]


def _with_axes(how: Preprocessing, axes: dict[str, Path]) -> Preprocessing:
    """Complete how files were preprocessed by where their axes point, so that a prediction's point there too.

    Args:
        how: as their attributes say.
        axes: an orientation of each kind that there is, such as "SPL" of slices in axial planes, or "" for none; and
            one of its files.

    Raises:
        UserError: there are several kinds, and nothing else says which way a scan is to be turned.
    """
    is_open = how.orientation is None or (how.layout == "slices" and how.slice_axis is None)
    if not is_open:
        return how
    if len(axes) > 1 and how.trust_slice_spacing:
        (one, first), (other, second), *_ = axes.items()
        raise UserError(
            f"the axes of {first} point to {one or 'nobody knows where'}, those of {second} to "
            f"{other or 'nobody knows where'}: convert all alike."
        )
    codes = next(iter(axes)) if len(axes) == 1 else ""
    if len(codes) != 3:
        LOGGER.info("where the training files' axes point is not known or not one way: scans are taken as stored")
        return how
    if how.layout == "volume":
        return replace(how, orientation=codes)
    if how.orientation is None:
        return replace(how, orientation=codes[::-1], slice_axis="z")
    along = next(k for k, pair in enumerate(how.orientation) if codes[0] in _pair(pair))
    return replace(how, slice_axis=AXES[along])


def _pair(code: str) -> str:
    """Return both ends of an anatomical axis, by one of them."""
    return next(pair for pair in ("LR", "PA", "IS") if code in pair)
