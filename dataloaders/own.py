"""A data set of one's own, as dataloaders/import_nifti.py writes it."""

import json
from pathlib import Path

from dataloaders.datasets import SLICE, DataSet, find_file
from dataloaders.files import read_list
from dataloaders.scans.preprocessing import Preprocessing
from sdcl.runs.errors import UserError

DESCRIPTION = "dataset.json"


def is_name(name: str) -> bool:
    """Tell whether a data set may be called so: letters, digits, - and _."""
    return name.replace("_", "").replace("-", "").isalnum()


def read_data_set(root_path: Path) -> DataSet:
    """Read what a folder's dataset.json says: the name, the classes and their label values, the preprocessing.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = root_path / DESCRIPTION
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names, how = tuple(map(str, content["class_names"])), Preprocessing.from_dict(content["preprocessing"])
        name, values = str(content["name"]), tuple(map(int, content.get("label_values", ())))
        patients = {str(case): str(patient) for case, patient in content.get("patients", {}).items()}
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: give as --root_path the folder that `dataloaders/import_nifti.py` wrote."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}): import the data again.") from None
    if not names or not is_name(name):
        raise UserError(f"{path} needs class_names and a name of letters, digits, - and _: correct it.")
    if values and len(values) != len(names):
        raise UserError(f"{path} has {len(names)} class_names and {len(values)} label_values: correct it.")

    def patient_of(case: str) -> str:
        case = case.rsplit(SLICE, 1)[0]
        return patients.get(case, case)

    return DataSet(
        name=name, class_names=names, preprocessing=how, path_of=find_file, label_values=values, patient_of=patient_of
    )


def count_labelled(root_path: Path, data_set: DataSet) -> int:
    """Return how many training cases have a label."""
    if data_set.preprocessing.layout == "volume":
        return len(read_list(root_path / "data_split" / "train_lab.txt"))
    return len(set(map(data_set.patient_of, read_list(root_path / "data_split" / "train_lab.list"))))


def has_val(root_path: Path) -> bool:
    """Tell whether cases were set aside for validation."""
    return any((root_path / "data_split" / name).exists() for name in ("val.txt", "val.list"))
