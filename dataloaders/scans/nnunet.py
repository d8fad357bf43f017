"""nnU-Net's layout of a data set: what its dataset.json says, and which files make a case."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataloaders.scans.channels import FIRST, group
from dataloaders.scans.convert import few
from dataloaders.scans.joining import Cases, checked
from dataloaders.scans.pictures import is_picture
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
        normalise: the rule for each channel.
        channels: names of several channels; empty: one.
    """

    folder: Path
    ending: str
    class_names: tuple[str, ...]
    label_values: tuple[int, ...]
    normalise: tuple[str, ...]
    channels: tuple[str, ...] = ()


def read_description(folder: Path) -> Described:
    """Read a data set's dataset.json, of nnU-Net's second version or its first.

    Raises:
        UserError: it is missing or broken, or holds what is not taken: regions, an ignored label.
    """
    path = folder / DESCRIPTION
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        channels = content["channel_names"] if "channel_names" in content else content["modality"]
        channels = dict(enumerate(channels)) if isinstance(channels, list) else dict(channels)
        channels = {str(number): name for number, name in channels.items()}
        named = dict(content["labels"])
        if named and all(str(key).isdecimal() for key in named):  # number to name, as nnU-Net's first version has it
            named = {str(name): int(number) for number, name in named.items()}
        named = {name: _number(value) for name, value in named.items()}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give as --dataset the folder nnUNet_raw/DatasetXXX_Name.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}): restore it.") from None
    names = tuple(str(channels.get(str(k))) for k in range(len(channels)))
    if not names or "None" in names or len(set(names)) < len(names):
        raise UserError(f"{path}: its channels must be numbered 0, 1, ... and have different names: correct them.")
    if regions := [name for name, value in named.items() if not isinstance(value, int)]:
        raise UserError(f"{path}: the label {regions[0]} is a region of several numbers: give each number a label.")
    if "ignore" in named:
        raise UserError(f'{path} has a label "ignore", which no loss here leaves out: remove it from the labels.')
    others = sorted((value, name) for name, value in named.items() if value != 0)
    if not others or 0 not in named.values() or len({value for value, _ in others}) < len(others):
        raise UserError(f"{path}: its labels must be a background of 0 and different numbers: correct them.")
    ending = str(content.get("file_ending", ".nii.gz"))
    rules = tuple("ct" if name.upper() == "CT" else "zscore" for name in names)
    said = ", ".join(f"channel {name}, normalised by {rule}" for name, rule in zip(names, rules, strict=True))
    LOGGER.info("%s: %s; labels %s", path, said, ", ".join(n for _, n in others))
    labels = tuple(name for _, name in others), tuple(value for value, _ in others)
    return Described(folder, ending, *labels, rules, names if len(names) > 1 else ())


def _number(value: Any) -> Any:
    """Return a label's number, which some programs write as text; anything else, such as a region, as it is."""
    if isinstance(value, bool) or not isinstance(value, (str, float)):
        return value
    number = float(value)
    return int(number) if number.is_integer() else value


def find_cases(described: Described, config: Any) -> Cases:
    """Find a data set's cases, and on which side its splits or its own test set put them.

    Args:
        described: from read_description().
        config: import_nnunet.py's header: unlabelled, splits, fold.

    Raises:
        UserError: a file is missing, or belongs to no case.
    """
    folder, ending = described.folder, described.ending
    images = _images(folder / "imagesTr", described)
    labels = _labels(folder / "labelsTr", ending)
    if alone := sorted(set(labels) - set(images)):
        raise UserError(f"{labels[alone[0]]} has no image imagesTr/{alone[0]}{FIRST}{ending}: put it there.")
    files: dict[str, tuple] = {name: (paths, labels.get(name)) for name, paths in images.items()}
    tests = _images(folder / "imagesTs", described) if (folder / "imagesTs").is_dir() else {}
    scored = _labels(folder / "labelsTs", ending) if (folder / "labelsTs").is_dir() else {}
    if bare := [name for name in tests if name not in scored]:
        LOGGER.info("images of imagesTs without a label, left out (predict.py segments them): %s", few(bare))
    held = {name: (paths, scored[name]) for name, paths in tests.items() if name in scored}
    found = _images(config.unlabelled, described) if config.unlabelled is not None else {}
    more = {name: (paths, None) for name, paths in found.items()}
    for others, where in ((held, "imagesTs"), (more, "--unlabelled")):
        if twice := sorted(set(others) & set(files)):
            raise UserError(f"the case {twice[0]} is in imagesTr and in {where}: rename one of them.")
        files |= others
    splits = _sides(files, held, config)
    return checked(Cases(files, splits=splits, channels=described.channels))


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


def _images(folder: Path, described: Described) -> dict[str, tuple[Path, ...]]:
    """Return the images of a folder by case, a file a channel: names end with the channel's number."""
    ending, last = described.ending, len(described.channels or ("",)) - 1
    files = _with_ending(folder, ending)
    if not files:
        raise UserError(f"{folder} holds no images <case>{FIRST}{ending}: look at `file_ending` in {DESCRIPTION}.")
    stems = [path.name.removesuffix(ending) for path in files]
    if not any(re.fullmatch(r".+_\d{4}", stem) for stem in stems) and all(map(_is_labelled, files)):
        LOGGER.info(
            "%s: named as in the Medical Segmentation Decathlon, one file per case; the volumes of a 4D file are its "
            "channels", folder,
        )  # fmt: skip
        return {stem: (path,) for stem, path in zip(stems, files, strict=True)}
    numbers = "|".join(f"{k:04d}" for k in range(last + 1))
    for path in files:
        if not re.fullmatch(rf".+_({numbers})", path.name.removesuffix(ending)):
            raise UserError(
                f"{path} has none of the channels' numbers {FIRST}{f' to _{last:04d}' if last else ''} in its name, "
                f"which {DESCRIPTION} gives: rename it, or move it away."
            )
    found = {path.name.removesuffix(ending): path for path in files}
    if all(map(is_picture, files)) and all(name.endswith(FIRST) for name in found):
        return {name.removesuffix(FIRST): (path,) for name, path in found.items()}  # colours: all channels in one file
    if not described.channels:
        return {name.removesuffix(FIRST): (path,) for name, path in found.items()}
    return group(found, described.channels)


def _labels(folder: Path, ending: str) -> dict[str, Path]:
    """Return the labels of a folder by case."""
    return {path.name.removesuffix(ending): path for path in _with_ending(folder, ending)}


def _with_ending(folder: Path, ending: str) -> list[Path]:
    """Return a folder's files of the data set's ending; the others are named as left out."""
    files = _files(folder)
    if left := [path.name for path in files if not path.name.endswith(ending)]:
        LOGGER.info("%s: left out, since they do not end with %s: %s", folder, ending, ", ".join(left))
    return [path for path in files if path.name.endswith(ending)]


def _is_labelled(path: Path) -> bool:
    """Tell whether a label of an image's own name lies in the labels' folder, if there is one."""
    labels = path.parent.with_name(path.parent.name.replace("images", "labels"))
    return not labels.is_dir() or path.parent == labels or (labels / path.name).exists()


def _files(folder: Path) -> Sequence[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not there: give as --dataset the folder that holds imagesTr and labelsTr.")
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
