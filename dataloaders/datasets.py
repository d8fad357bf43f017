"""What a data set is to the scripts: names, files, preprocessing, and what its labels are checked for."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.alignment import TRUSTED, check_alignment
from dataloaders.files import Sample, read_text_attribute
from dataloaders.preprocessing import WINDOW_HU, Preprocessing
from sdcl.errors import UserError

SLICE = "_slice_"  # in a slice's name, before its number


@dataclass(frozen=True)
class DataSet:
    """What differs between data sets.

    Attributes:
        name: in a run folder's name.
        class_names: of the foreground classes 1 to C - 1.
        preprocessing: of files that do not say their own.
        path_of: maps the data set's folder and a case's name to its file.
        check_root: refuses a folder without the data set.
        is_organ_ct: labels are an organ's in CT, which lies on soft tissue.
        trained_on_crops: its files are cropped around the label.
        patient_of: maps a slice's name to its patient's, in 2D.
    """

    name: str
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    path_of: Callable[[Path, str], Path]
    check_root: Callable[[Path], None]
    is_organ_ct: bool = False
    trained_on_crops: bool = False
    patient_of: Callable[[str], str] = lambda name: name.rsplit(SLICE, 1)[0]

    @property
    def num_classes(self) -> int:
        """Count the classes, background included."""
        return len(self.class_names) + 1

    def check_label(self, path: Path, sample: Sample) -> None:
        """Refuse a CT's label that lies better flipped, unless its file's attribute `alignment` says "trusted".

        Raises:
            UserError: see check_alignment().
        """
        if self.preprocessing.normalise != "ct" or sample.label is None or not sample.label.any():
            return
        if sample.label.ndim != 3:  # of a slice; its volume was checked when it was made
            return
        if read_text_attribute(path, "alignment") == TRUSTED:
            return
        low, high = WINDOW_HU
        way_out = f'set the file\'s attribute `alignment` to "{TRUSTED}"'
        hu = sample.image.astype(np.float32) * (high - low) + low
        check_alignment(path, hu, sample.label, is_organ_ct=self.is_organ_ct, way_out=way_out)

    def preprocessing_of(self, paths: Sequence[Path]) -> Preprocessing:
        """Return how files were preprocessed, by their attributes; where they have none, this data set's usual way.

        Raises:
            UserError: they were preprocessed differently, or an attribute cannot be read.
        """
        found: dict[str | None, Path] = {}
        for path in paths:
            found.setdefault(read_text_attribute(path, "preprocessing"), path)
        if len(found) > 1:
            (text, first), (other_text, second), *_ = found.items()
            raise UserError(
                f"{first} and {second} were preprocessed differently ({text} and {other_text}): convert all alike."
            )
        ((text, path),) = found.items()
        try:
            return self.preprocessing if text is None else Preprocessing.from_dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path}: the attribute `preprocessing` cannot be read ({error}): convert it again."
            ) from None

    def facts(self, decision_rule: str, paths: Sequence[Path]) -> dict[str, Any]:
        """Return what a run's config.json keeps of the data set, for prediction: see preprocessing_of()."""
        how = self.preprocessing_of(paths)
        return {
            "name": self.name,
            "class_names": list(self.class_names),
            "decision_rule": decision_rule,
            "trained_on_crops": self.trained_on_crops,
            "preprocessing": json.loads(how.to_json()),
        }
