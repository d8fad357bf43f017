"""nnU-Net's layout of a data set: what its dataset.json says, and which files make a case."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataloaders.scans.convert import few
from dataloaders.scans.joining import CHANNEL, Cases, checked
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

DESCRIPTION = "dataset.json"


@dataclass(frozen=True)
class Described:
    """What a dataset.json says.

    Attributes:
        folder: of the data set.
        ending: of its files, such as ".nii.gz".
        class_names: of the labels but the background, in the order of their numbers.
        label_values: these numbers.
        normalise: the rule for its channel.
    """

    folder: Path
    ending: str
    class_names: tuple[str, ...]
    label_values: tuple[int, ...]
    normalise: str


def read_description(folder: Path) -> Described:
    """Read a data set's dataset.json, of nnU-Net's second version or its first.

    Raises:
        UserError: it is missing or broken, or holds what is not taken: several channels, regions, an ignored label.
    """
    path = folder / DESCRIPTION
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        is_second = "channel_names" in content
        channels = content["channel_names"] if is_second else content["modality"]
        named = content["labels"] if is_second else {name: int(value) for value, name in content["labels"].items()}
        channels, named = dict(channels), dict(named)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give as --dataset the folder nnUNet_raw/DatasetXXX_Name.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}): restore it.") from None
    if len(channels) != 1:
        raise UserError(
            f"{path} has {len(channels)} channels ({', '.join(map(str, channels.values()))}), and images of one are "
            "taken: import one channel's files with import_nifti.py."
        )
    if regions := [name for name, value in named.items() if not isinstance(value, int)]:
        raise UserError(f"{path}: the label {regions[0]} is a region of several numbers: give each number a label.")
    if "ignore" in named:
        raise UserError(f'{path} has a label "ignore", which no loss here leaves out: remove it from the labels.')
    others = sorted((value, name) for name, value in named.items() if value != 0)
    if not others or 0 not in named.values() or len({value for value, _ in others}) < len(others):
        raise UserError(f"{path}: its labels must be a background of 0 and different numbers: correct them.")
    ending = str(content.get("file_ending", ".nii.gz"))
    channel = str(next(iter(channels.values())))
    rule = "ct" if channel.upper() == "CT" else "zscore"
    LOGGER.info("%s: channel %s, normalised by %s; labels %s", path, channel, rule, ", ".join(n for _, n in others))
    return Described(folder, ending, tuple(name for _, name in others), tuple(value for value, _ in others), rule)


def find_cases(described: Described, config: Any) -> Cases:
    """Find a data set's cases, and on which side its splits or its own test set put them.

    Args:
        described: from read_description().
        config: import_nnunet.py's header: unlabelled, splits, fold.

    Raises:
        UserError: a file is missing, or belongs to no case.
    """
    folder, ending = described.folder, described.ending
    images = _images(folder / "imagesTr", ending)
    labels = _labels(folder / "labelsTr", ending)
    if alone := sorted(set(labels) - set(images)):
        raise UserError(f"{labels[alone[0]]} has no image imagesTr/{alone[0]}{CHANNEL}{ending}: put it there.")
    files: dict[str, tuple[Path, Path | None]] = {name: (path, labels.get(name)) for name, path in images.items()}
    tests = _images(folder / "imagesTs", ending) if (folder / "imagesTs").is_dir() else {}
    scored = _labels(folder / "labelsTs", ending) if (folder / "labelsTs").is_dir() else {}
    if bare := [name for name in tests if name not in scored]:
        LOGGER.info("images of imagesTs without a label, left out (predict.py segments them): %s", few(bare))
    held = {name: (path, scored[name]) for name, path in tests.items() if name in scored}
    more = _images(config.unlabelled, ending) if config.unlabelled is not None else {}
    for others, where in ((held, "imagesTs"), (more, "--unlabelled")):
        if twice := sorted(set(others) & set(files)):
            raise UserError(f"the case {twice[0]} is in imagesTr and in {where}: rename one of them.")
        files |= {name: value if isinstance(value, tuple) else (value, None) for name, value in others.items()}
    splits = _sides(files, held, config)
    return checked(Cases(files, splits=splits))


def _sides(files: Mapping[str, tuple], held: Mapping[str, tuple], config: Any) -> dict[str, str]:
    """Return the side of each labelled case; nothing where they are to be drawn.

    Raises:
        UserError: the splits are broken, have no such fold, or name other cases.
    """
    labelled = [name for name, (_, label) in files.items() if label is not None]
    if config.splits is None:
        if not held:
            return {}
        rest = [name for name in labelled if name not in held]
        return dict.fromkeys(held, "test") | dict.fromkeys(rest, "train")
    try:
        folds = json.loads(config.splits.read_text(encoding="utf-8-sig"))
        train, val = (list(map(str, folds[config.fold][side])) for side in ("train", "val"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--splits {config.splits} cannot be read ({type(error).__name__}: {error}).") from None
    except IndexError:
        raise UserError(f"--fold is {config.fold}, but {config.splits} has {len(folds)} folds: count from 0.") from None
    unknown = sorted(({*train, *val}) - set(labelled))
    if unknown:
        raise UserError(f"--splits {config.splits} names {unknown[0]}, which has no image or no label in imagesTr.")
    sides = dict.fromkeys(train, "train") | dict.fromkeys(val, "val" if held else "test") | dict.fromkeys(held, "test")
    if left := [name for name in labelled if name not in sides]:
        raise UserError(f"--splits {config.splits} leaves {left[0]} out of fold {config.fold}: add it to one side.")
    return sides


def _images(folder: Path, ending: str) -> dict[str, Path]:
    """Return the images of a folder by case: the files that end with the first channel's number."""
    found, others = {}, []
    for path in _files(folder):
        if path.name.endswith(CHANNEL + ending):
            found[path.name.removesuffix(CHANNEL + ending)] = path
        elif path.name.endswith(ending):
            others.append(path)
    if others:
        raise UserError(f"{others[0]} has not the number {CHANNEL} of a single channel in its name: rename it.")
    if not found:
        raise UserError(f"{folder} holds no images <case>{CHANNEL}{ending}: look at `file_ending` in {DESCRIPTION}.")
    return found


def _labels(folder: Path, ending: str) -> dict[str, Path]:
    """Return the labels of a folder by case."""
    return {path.name.removesuffix(ending): path for path in _files(folder) if path.name.endswith(ending)}


def _files(folder: Path) -> Sequence[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not there: give as --dataset the folder that holds imagesTr and labelsTr.")
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
