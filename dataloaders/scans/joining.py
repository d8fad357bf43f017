"""Which scan and which label make a case: by their names in two folders, by patterns, or by a table."""

import csv
import difflib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataloaders.checks import name_fault
from dataloaders.datasets import SLICE
from dataloaders.scans.channels import FIRST, NUMBERED, PLACE, group, numbers_of
from dataloaders.scans.choosing import check_one_each, listing
from dataloaders.scans.dicom_labels import holds_segmentation, segmentation_in
from dataloaders.scans.finding import ClassMasks, SeriesPath, find_labels
from dataloaders.scans.reading import find_scans
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

FURTHER = ("label", "patient", "split")  # columns of a table that may be missing or empty
SPLITS = ("train", "val", "test")
CLASS = "{class}"  # stands in --label_pattern for the name of each class
MAX_TABLE_BYTES = 2**26
ENTITIES = re.compile(r"(.+)_[a-z]+-[A-Za-z0-9]+")  # a BIDS name and one more entity of it


@dataclass(frozen=True)
class Cases:
    """The cases of an import.

    Attributes:
        files: each case's scan, a file a channel, and its label, or None without one.
        patients: whose a case is, where a table says so; else each case is its own patient.
        splits: "train", "val" or "test" of each case, where a table says so.
        channels: names of several channels, in the order of the files; empty: one.
        class_names: names of the classes 1, 2, ... where labels have one file per class; else empty.
    """

    files: dict[str, tuple[tuple[Path, ...], Path | None]]
    patients: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)
    channels: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()


def find_cases(config: Any) -> Cases:
    """Find the cases that an import's header names: by --table, by patterns, or by the names in two folders.

    Raises:
        UserError: too little or too much is given, or files do not belong together.
    """
    patterns = (config.image_pattern, config.label_pattern)
    folders, channels = (config.images, config.labels), config.channels
    if len(channels) == 1 or len(set(channels)) < len(channels):
        raise UserError(f"--channels {' '.join(channels)} must be several different names; of one, leave it out.")
    if config.table is not None:
        if any(given is not None for given in (*folders, *patterns)):
            raise UserError("--table names every file itself: leave --images, --labels and the patterns out.")
        return checked(read_table(config.table, channels, config.series))
    if config.images is None or config.labels is None:
        raise UserError("--images and --labels are needed, the folders of the scans and of the labels; or --table.")
    if any(patterns):
        if not all(patterns):
            raise UserError("--image_pattern and --label_pattern belong together: give both.")
        images = by_patterns(config.images, patterns[0], channels)
        if config.series is not None:
            images = {name: tuple(_one_series(path, config.series) for path in paths) for name, paths in images.items()}
        if CLASS in patterns[1]:
            names = tuple(getattr(config, "class_names", ())) or _class_names(config.labels, patterns[1])
            labels = by_class(config.labels, patterns[1], names)
        else:
            names, labels = (), by_pattern(config.labels, patterns[1])
        return checked(Cases(_paired(images, labels, config.images), channels=channels, class_names=names))
    return checked(join(config.images, config.labels, channels, config.series))


def join(images: Path, labels: Path, channels: tuple[str, ...] = (), series: str | None = None) -> Cases:
    """Join scans and labels by name.

    Args:
        images: folder of the scans.
        labels: folder of the labels; the same one where these are DICOM segmentations beside their series.
        channels: that scans' names end with; empty: one, or the numbers _0000, _0001, ... that they end with.
        series: which DICOM series of each patient (what lies in one folder below `images`) is the case.

    Raises:
        UserError: a label has no scan, a scan lacks a channel, or a patient has several series that are meant.
    """
    is_one_folder = images.resolve() == labels.resolve()
    masks = find_labels(labels) if not is_one_folder or holds_segmentation(labels) else {}
    if is_one_folder and not (masks and all(segmentation_in(path) for path in masks.values())):
        raise UserError(f"--images and --labels are both {images}: give the folder of each, or patterns.")
    found = find_scans(images, series)
    if series is not None:
        check_one_each(images, found, series)
    channels = channels or numbers_of(found, masks)
    if channels:
        LOGGER.info("%s: images of %d channels, %s", images, len(channels), ", ".join(channels))
        return Cases(_paired(group(found, channels), masks, images), channels=channels)
    numbered = {match[1] for match in map(NUMBERED.fullmatch, masks) if match} - set(masks)
    scans = {
        name if name in masks or name.removesuffix(FIRST) in numbered else name.removesuffix(FIRST): path
        for name, path in found.items()
    }
    return Cases(_paired(group(scans, ()), masks, images))


def _one_series(path: Path, series: str) -> Path:
    """Return the one series of a folder that is meant.

    Raises:
        UserError: it is none, or several, or the path is no folder.
    """
    if path.is_file():
        raise UserError(f"--series chooses among the series of folders, and --image_pattern names the file {path}.")
    found = list(find_scans(path, series).values())
    if len(found) > 1:
        lines = listing([one.about for one in found])
        raise UserError(
            f"--series {series} fits {len(found)} series of {path}: give one that fits a single one:{lines}"
        )
    return found[0]


def _paired(
    scans: Mapping[str, tuple[Path, ...]], masks: Mapping[str, Path], images: Path
) -> dict[str, tuple[tuple[Path, ...], Path | None]]:
    """Give each scan its label.

    Raises:
        UserError: a label has no scan.
    """
    masks = _without_entities(masks, scans)
    for name, path in masks.items():
        if name not in scans:
            close = difflib.get_close_matches(name, scans, n=1)
            there = f"there are {', '.join(list(scans)[:3])} ..."
            hint = f"the closest is {scans[close[0]][0].name}" if close else there
            raise UserError(f"{path} has no scan of the name {name} in {images} ({hint}): rename one of them.")
    return {name: (paths, masks.get(name)) for name, paths in scans.items()}


def _without_entities(masks: Mapping[str, Path], scans: Mapping[str, Any]) -> dict[str, Path]:
    """Rename labels to their scans' names where BIDS adds entities, such as sub-01_space-orig to sub-01."""
    named, told = {}, []
    for name, path in masks.items():
        match = None if name in scans else ENTITIES.fullmatch(name)
        while match and match[1] not in scans:
            match = ENTITIES.fullmatch(match[1])
        scan = match[1] if match else name
        if scan in named or (match and scan in masks):
            raise UserError(f"{named.get(scan) or masks[scan]} and {path} are both labels of {scan}: keep one of them.")
        if match:
            told.append(f"{name} belongs to {scan}")
        named[scan] = path
    if told:
        LOGGER.info("labels with further BIDS entities in their names: %s%s", told[0], ", ..." * (len(told) > 1))
    return named


def checked(cases: Cases) -> Cases:
    """Refuse cases whose names a list or a folder cannot hold."""
    written: dict[str, Path] = {}
    for name, ((path, *_), _) in cases.files.items():
        fault = name_fault(name) or (f"it contains {SLICE}" if SLICE in name else "")
        if fault:
            raise UserError(f"{path} cannot give a case the name {name!r} ({fault}): rename the scan and its label.")
        other = written.setdefault(name.casefold(), path)
        if other != path:
            raise UserError(f"{other} and {path} differ in capitals alone, which some systems ignore: rename one.")
    return cases


# --- patterns ---


def by_patterns(folder: Path, pattern: str, channels: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """Do what by_pattern() does, of several channels once for each, in the place of "{channel}".

    Raises:
        UserError: see by_pattern(), or the place is missing, or a case lacks a channel.
    """
    if (PLACE in pattern) != bool(channels):
        raise UserError(
            f"--image_pattern {pattern} and --channels belong together: {PLACE} stands in the pattern for each of them."
        )
    if not channels:
        return group(by_pattern(folder, pattern), ())
    found = {channel: by_pattern(folder, pattern.replace(PLACE, channel)) for channel in channels}
    for name in sorted(set().union(*found.values())):
        if missing := [channel for channel, files in found.items() if name not in files]:
            raise UserError(
                f"the case {name} has no channel {missing[0]}, which {pattern} would name: put its file there, or "
                "leave the case out."
            )
    return {name: tuple(files[name] for files in found.values()) for name in found[channels[0]]}


def by_pattern(folder: Path, pattern: str) -> dict[str, Path]:
    """Find the files below a folder that a pattern names, such as "**/*_T1w.nii.gz" or "*/image.nrrd".

    A case is called after what the stars in the file's name stand for; where that has none, after what those of its
    folders do, joined by `_`.

    Args:
        folder: where to look.
        pattern: with `/` between folders; `*` and `?` stand for any letters within a name, `**` for any folders.

    Returns:
        Case name to file (or DICOM folder), sorted by name.

    Raises:
        UserError: nothing is found, the pattern has no star, or two files give one case.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the one that holds the scans.")
    if "*" not in pattern or pattern.startswith("/") or ".." in pattern.split("/"):
        raise UserError(f"the pattern {pattern} needs a star, and no way out of {folder}: such as **/*_T1w.nii.gz.")
    folders, _, last = pattern.rpartition("/")
    if last == "**":
        raise UserError(
            f"the pattern {pattern} names folders alone: end it with the files' names, such as **/*.nii.gz."
        )
    named = last if "*" in last else folders
    expression = re.compile(_expression(pattern, grouped=named is last, at=len(pattern) - len(last)))
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(pattern)):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):  # such as ._a.nii.gz of macOS
            continue
        match = expression.fullmatch(path.relative_to(folder).as_posix())
        name = "_".join(part.strip("/").replace("/", "_") for part in match.groups() if part) if match else ""
        name = unicodedata.normalize("NFC", name)
        if not name:
            raise UserError(f"the stars of {pattern} stand for nothing in {path}, which then has no name: add one.")
        if name in found:
            raise UserError(
                f"{found[name]} and {path} both make the case {name}: put a star where their paths differ, in the "
                "file's name, or name the files in a --table."
            )
        found[name] = path
    if not found:
        raise UserError(f"{folder} holds nothing of the pattern {pattern}: look at the folders' and files' names.")
    LOGGER.info("%s: %d files of %s, the first is the case %s", folder, len(found), pattern, next(iter(found)))
    return dict(sorted(found.items()))


def by_class(folder: Path, pattern: str, class_names: Sequence[str]) -> dict[str, Path]:
    """Find labels that are stored as one mask file per class, "{class}" in the pattern standing for its name.

    Args:
        folder: where to look.
        pattern: as for by_pattern(), such as "*/segmentations/{class}.nii.gz".
        class_names: of the classes 1, 2, ...

    Returns:
        Case name to ClassMasks. A case without the file of a class lacks that class, which is logged.

    Raises:
        UserError: a class has no file at all, or a name is given twice.
    """
    masks: dict[str, list[tuple[int, Path]]] = {}
    for number, name in enumerate(class_names, start=1):
        for case, path in by_pattern(folder, pattern.replace(CLASS, name)).items():
            masks.setdefault(case, []).append((number, path))
    for number, name in enumerate(class_names, start=1):
        if missing := [case for case, there in masks.items() if number not in dict(there)]:
            LOGGER.info(
                "NOTE: no file of the class %s; the class counts as absent in these cases: %s", name, ", ".join(missing)
            )
    return {case: ClassMasks.of(there) for case, there in sorted(masks.items())}


def _class_names(folder: Path, pattern: str) -> tuple[str, ...]:
    """Return the names that "{class}" stands for in the files that are there, in alphabetical order."""
    marker = "classname"
    text = _expression(pattern.replace(CLASS, marker), grouped=False, at=len(pattern) * 2)
    expression = re.compile(text.replace(marker, "(?P<name>[^/]+)", 1).replace(marker, "(?P=name)"))
    matches = (
        expression.fullmatch(path.relative_to(folder).as_posix()) for path in folder.glob(pattern.replace(CLASS, "*"))
    )
    names = tuple(sorted({match["name"] for match in matches if match and not match["name"].startswith(".")}))
    if not names:
        raise UserError(f"{folder} holds nothing of the pattern {pattern}: look at the folders' and files' names.")
    LOGGER.info("one file per class: %s (--class_names chooses and orders them)", ", ".join(names))
    return names


def _expression(pattern: str, grouped: bool, at: int) -> str:
    """Return a pattern as a regular expression whose groups are the stars of its last name, or of its folders."""
    parts, place = [], 0
    for piece in re.split(r"(\*\*/|\*|\?)", pattern):
        is_counted = piece not in ("", "?") and (place >= at) == grouped
        inner = {"**/": "(?:[^/]+/)*", "*": "[^/]*", "?": "[^/]"}.get(piece)
        place += len(piece)
        if inner is None:
            parts.append(re.escape(piece))
        else:
            parts.append(f"({inner})" if is_counted else f"(?:{inner})")
    return "".join(parts)


# --- a table ---


def read_table(path: Path, channels: tuple[str, ...] = (), series: str | None = None) -> Cases:
    """Read a table of cases: CSV with the columns case and image, and maybe label, patient and split.

    Of several channels each has a column of its name in the place of image.

    Files are named as seen from the table's folder; a folder is a DICOM series. Where a split is given, it is for every
    case that has a label, "train", "val" or "test"; a case without a label trains.

    Args:
        path: of the table.
        series: which DICOM series of an image's folder is meant, where it holds several.

    Raises:
        UserError: names the line that is wrong.
    """
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise UserError(f"{path} has more than {MAX_TABLE_BYTES} bytes: write a line a case.")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--table {path} cannot be read ({error}): write it as UTF-8 text, a line a case.") from None
    head = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=head.count)  # Excel writes semicolons in many languages
    lines = [line for line in text.splitlines() if line.strip(f" {delimiter}")]  # Excel writes empty rows
    lines[:1] = [delimiter.join(name.strip() for name in line.split(delimiter)) for line in lines[:1]]
    rows = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True)
    images = channels or ("image",)
    needed = ("case", *images)
    unknown = [name for name in rows.fieldnames or () if name not in (*needed, *FURTHER)]
    if unknown or not set(needed) <= set(rows.fieldnames or ()):
        raise UserError(
            f"--table {path} has the columns {', '.join(rows.fieldnames or ()) or 'none'}: it needs "
            f"{', '.join(needed[:-1])} and {needed[-1]}, and may have label, patient and split (--channels names the "
            "columns of several channels)."
        )
    files: dict[str, tuple[tuple[Path, ...], Path | None]] = {}
    patients: dict[str, str] = {}
    splits: dict[str, str] = {}
    for row in rows:
        given = {name: (row.get(name) or "").strip() for name in (*needed, *FURTHER)}
        name, where = unicodedata.normalize("NFC", given["case"]), f"--table {path}, line {rows.line_num}"
        if not name or name in files:
            raise UserError(f"{where}: {f'the case {name} is there already' if name else 'the case has no name'}.")
        find = lambda folder: find_scans(folder, series)  # noqa: E731
        paths = tuple(_file(path.parent, given[image], where, find) for image in images)
        label = _file(path.parent, given["label"], where, find_labels) if given["label"] else None
        files[name] = paths, label
        if given["patient"]:
            patients[name] = given["patient"]
        if given["split"]:
            if given["split"] not in SPLITS:
                raise UserError(f"{where}: the split {given['split']} is none of {', '.join(SPLITS)}.")
            if label is None and given["split"] != "train":
                raise UserError(f"{where}: a case of {given['split']} needs a label to be scored against.")
            splits[name] = given["split"]
    if not files:
        raise UserError(f"--table {path} has no lines: write one a case.")
    if series is not None and not any(isinstance(p, SeriesPath) for paths, _ in files.values() for p in paths):
        raise UserError(f"--series chooses among the series of folders, and --table {path} names files alone.")
    cases = Cases(files, patients, splits, channels)
    _check_columns(path, cases)
    return cases


def _check_columns(path: Path, cases: Cases) -> None:
    """Refuse a table that gives some cases a patient or a split and others none, or a patient on both sides.

    Raises:
        UserError: names the case or patient.
    """
    files, patients, splits = cases.files, cases.patients, cases.splits
    for column, known in (("patient", patients), ("split", splits)):
        if without := [
            name for name, (_, label) in files.items() if name not in known and (label or column == "patient")
        ]:
            if known:
                raise UserError(f"--table {path} gives some cases a {column}, but {without[0]} has none: give it one.")
    sides: dict[str, tuple[str, str]] = {}
    for name in files:
        patient, split = patients.get(name, name), splits.get(name, "train")
        other, before = sides.setdefault(patient, (name, split))
        if splits and before != split:
            raise UserError(
                f"--table {path} has the patient {patient} in {before} ({other}) and in {split} ({name}): a patient "
                "must be on one side."
            )


def _file(folder: Path, text: str, where: str, find: Callable[[Path], dict[str, Path]]) -> Path:
    """Return the file, or what `find` finds in a folder, that a table names."""
    path = folder / text
    if not text or not path.exists():
        raise UserError(f"{where}: the file {text or '(none)'} does not exist, seen from {folder}: correct the path.")
    if path.is_dir():
        found = find(path)
        if len(found) > 1:
            raise UserError(
                f"{where}: {path} holds {len(found)} scans ({', '.join(list(found)[:3])}): name one of them."
            )
        return next(iter(found.values()))
    return path
