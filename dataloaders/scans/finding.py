"""The scans below a folder: files and DICOM series at any depth, each with a name; what is left out is told."""

import glob
import hashlib
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataloaders.checks import is_lfs_pointer
from dataloaders.scans.choosing import about, chosen
from dataloaders.scans.dicom import NAMES, is_dicom
from dataloaders.scans.dicom_labels import CONTOURS, SEGMENTATIONS, kind_of, refusal_of_contours
from dataloaders.scans.pictures import PICTURES, SIDECAR, is_picture, is_stack
from dataloaders.scans.series import NO_IMAGE, LeftOut, Series, sort_out, tell_left_out
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

NIFTI = (".nii", ".nii.gz")
PAIR = (".hdr",)  # with an .img beside it
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
MGH = (".mgz", ".mgh")  # FreeSurfer's
SUFFIXES = (*NIFTI, *ITK, *MGH)
PIXELS_OF = {".raw": ITK, ".zraw": ITK, ".raw.gz": ITK, ".img": PAIR, ".img.gz": PAIR}  # whose header is beside them
NO_SCAN = ("is of no format that is read here", "are of no format that is read here")
POINTER = ("is a git-lfs pointer (run git lfs pull)", "are git-lfs pointers (run git lfs pull)")
PICTURE = ("is a picture beside scans", "are pictures beside scans")
NO_FILE = ("cannot be opened", "cannot be opened")
NO_SERIES = ("is no DICOM series, of which --series chooses,", "are no DICOM series, of which --series chooses,")
OF_IMAGES = ("is an image beside segmentations", "are images beside segmentations")
OF_CONTOURS = ("holds contours (RTSTRUCT) beside a label", "hold contours (RTSTRUCT) beside a label")
MAX_NAME = 150  # bytes; file systems allow 255, and predictions add to it


class SeriesPath(type(Path())):
    """A DICOM series: the path of the folder that it is called after, or of its first file where that holds more.

    Attributes:
        files: all files of the series.
        about: its number, description, size and identifier, for messages.
    """

    files: tuple[Path, ...] = ()
    about: str = ""


class VolumePath(type(Path())):
    """One 3D volume of a 4D file.

    Attributes:
        volume: its number along the fourth axis, from 0.
    """

    volume: int | None = None

    @classmethod
    def of(cls, path: Path, volume: int) -> "VolumePath":
        """Name a volume of a file."""
        one = cls(path)
        one.volume = volume
        return one


class ClassMasks(type(Path())):
    """A label map that is stored as one mask file per class; the path of the folder that the files lie in.

    Attributes:
        masks: the class's number and its file, in order.
        files: the files.
    """

    masks: tuple[tuple[int, Path], ...] = ()
    files: tuple[Path, ...] = ()

    @classmethod
    def of(cls, masks: Sequence[tuple[int, Path]]) -> "ClassMasks":
        """Put the mask files of one case together."""
        one = cls(masks[0][1].parent)
        one.masks, one.files = tuple(masks), tuple(path for _, path in masks)
        return one


@dataclass(frozen=True, eq=False)
class _Found:
    """A scan and its place below the folder: of a file the last of `parts` is its name, of a series its folder's.

    A DICOM segmentation that lies alone in its folder is called after that as a series is (`is_folder`).
    """

    parts: tuple[str, ...]
    file: Path | None = None
    series: Series | None = None
    is_folder: bool = False


def suffix_of(path: Path, suffixes: Sequence[str] = (*SUFFIXES, *PAIR, *PICTURES)) -> str:
    """Return the longest of some suffixes that a file's name ends with, in any case; "" for none."""
    name = path.name.lower()
    return next((s for s in sorted(suffixes, key=len, reverse=True) if name.endswith(s) and name != s), "")


def name_of(path: Path) -> str:
    """Return a scan's name: the file's without its suffix, or the folder's."""
    suffix = suffix_of(path)
    if not suffix and is_picture(path):
        suffix = suffix_of(path, NAMES)
    name = path.name[: len(path.name) - len(suffix)] if suffix and path.is_file() else path.name
    return unicodedata.normalize("NFC", name)  # macOS stores letters and their accents apart


def find_scans(folder: Path, series: str | None = None) -> dict[str, Path]:
    """Find the scans below a folder: files and DICOM series, at any depth; what is left out is logged.

    Pictures (PNG, TIFF ...) are scans where there are no others, and else previews of them, left out.

    A file is called after its path below the folder, joined by `_`; a series after the shortest part of its path that
    holds no other scan, or after the folder itself where that is the series; several of one folder by their number.

    Args:
        folder: where to look.
        series: only the DICOM series that this means, see choosing.chosen().

    Returns:
        Name to file or series, sorted by name; the values of series are SeriesPath.

    Raises:
        UserError: there is none, or two files beside each other have the same name.
    """
    files, all_series, left = _there(folder)
    kept = all_series
    if series is not None:
        left |= {NO_SERIES: files} if files else {}
        files, kept = [], chosen(folder, all_series, series)
    tell_left_out(folder, left)
    if not files and not kept:
        raise UserError(
            f"{folder} holds no scans: expected {', '.join(SUFFIXES)} files, pictures or folders of DICOM series there."
        )
    return _named(folder, [*_files(folder, files), *_series(folder, kept)], all_series)


def find_labels(folder: Path) -> dict[str, Path]:
    """Find the labels below a folder: as find_scans() does, or DICOM segmentations.

    A segmentation is called after its folder, as a series is, or, where that is `folder` itself or holds several, as a
    file is. Images beside segmentations are no labels.

    Returns:
        Name to file or series, sorted by name.

    Raises:
        UserError: there is none; or a patient (what lies in one folder below this) has contours (RTSTRUCT) alone.
    """
    files, series, left = _there(folder)
    kinds = {path: kind_of(path) for path in left.get(NO_IMAGE, ())}
    segmentations = [path for path, kind in kinds.items() if kind in SEGMENTATIONS]
    contours = [path for path, kind in kinds.items() if kind == CONTOURS]
    images = [one for one in series if segmentations and one.headers]
    series = [one for one in series if one not in images]
    labelled = {_top(folder, path) for path in (*files, *segmentations, *(one.files[0] for one in series))}
    for path in contours:
        if _top(folder, path) not in labelled:
            raise refusal_of_contours(path)
    rest = [path for path in kinds if path not in segmentations and path not in contours]
    told = {NO_IMAGE: rest, OF_CONTOURS: contours, OF_IMAGES: [path for one in images for path in one.files]}
    tell_left_out(folder, {reason: paths for reason, paths in (left | told).items() if paths})
    if not files and not series and not segmentations:
        raise UserError(f"{folder} holds no labels: expected {', '.join(SUFFIXES)} files or DICOM segmentations there.")
    parents = [path.parent for path in segmentations]
    found = [*_files(folder, files), *_series(folder, series)]
    for path in segmentations:
        is_alone = path.parent != folder and parents.count(path.parent) == 1
        parts = path.parent.relative_to(folder).parts
        name = path.stem if path.suffix.lower() == ".dcm" else path.name
        found.append(_Found(parts if is_alone else (*parts, name), file=path, is_folder=is_alone))
    return _named(folder, found, series)


def _top(folder: Path, path: Path) -> str:
    """Return the first part of a path below a folder, a patient's; of a file right there its name without suffix."""
    first = path.relative_to(folder).parts[0]
    return name_of(path) if path.parent == folder else first


def _there(folder: Path) -> tuple[list[Path], list[Series], LeftOut]:
    """Return the scans' files and the DICOM series below a folder, and what is neither.

    Raises:
        UserError: it is no folder, or two files beside each other have the same name.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the one that holds the scans.")
    left: LeftOut = {}
    files, dicoms, pictures = [], [], []
    for path in _walk(folder, left):
        if is_picture(path):
            pictures.append(path)
        elif is_scan_file(path):
            files.append(path)
        elif is_dicom(path):
            dicoms.append(path)
        elif not _is_part(path):
            left.setdefault(POINTER if is_lfs_pointer(path) else NO_SCAN, []).append(path)
    series, without = sort_out(dicoms)
    if files or series:
        left |= {PICTURE: pictures} if pictures else {}
    else:
        files = pictures
    _check_twins(files)
    return files, series, without | left


def _files(folder: Path, files: Sequence[Path]) -> list[_Found]:
    return [_Found((*path.parent.relative_to(folder).parts, name_of(path)), file=path) for path in files]


def _series(folder: Path, series: Sequence[Series]) -> list[_Found]:
    return [_Found(one.folder.relative_to(folder).parts, series=one, is_folder=True) for one in series]


def is_scan_file(path: Path) -> bool:
    """Tell whether a file's name is that of a scan."""
    if suffix_of(path, PAIR):
        return path.with_suffix(".img").exists() or path.with_suffix(".img.gz").exists()
    return bool(suffix_of(path, SUFFIXES)) or is_stack(path)


def _is_part(path: Path) -> bool:
    """Tell whether a file holds the voxels of a header beside it."""
    if path.name.lower().endswith(SIDECAR):
        return any(path.parent.glob(f"{glob.escape(path.stem)}*.tif*"))
    suffix = suffix_of(path, tuple(PIXELS_OF))
    stem = path.name[: len(path.name) - len(suffix)] if suffix else ""
    return any(path.with_name(stem + header).exists() for header in PIXELS_OF.get(suffix, ()))


def _walk(folder: Path, left: LeftOut) -> Iterator[Path]:
    """Yield the files below a folder in order, through links, without those whose names begin with a dot."""
    seen = set()

    def unreadable(error: OSError) -> None:
        left.setdefault(NO_FILE, []).append(Path(error.filename))

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(parent)
        if real in seen:  # a link in a circle, or to what was there already
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in sorted(names) if not name.startswith(".")):
            if path.is_file() and os.access(path, os.R_OK):
                yield path
            else:  # a link to nothing, a pipe, another's file
                left.setdefault(NO_FILE, []).append(path)


def _check_twins(files: Sequence[Path]) -> None:
    there: dict[Path, Path] = {}
    for path in files:
        other = there.setdefault(path.with_name(name_of(path)), path)
        if other != path:
            raise UserError(f"{path.parent} holds {other.name} and {path.name}: remove or rename one of them.")


def _named(folder: Path, found: Sequence[_Found], all_series: Sequence[Series]) -> dict[str, Path]:
    """Give each scan a name of its own, the same whenever the folder holds the same.

    Args:
        folder: below which they lie.
        found: the scans.
        all_series: those that lie there, chosen or not.
    """
    names: dict[str, Path] = {}
    for one in sorted(found, key=lambda f: (f.series is not None, f.parts, f.file or f.series.files[0])):
        parts = _short_parts(one, found)
        path = one.file or _series_path(one.series, folder.joinpath(*parts), all_series)
        number = _number(one, found)
        base = _short("_".join(parts) or folder.resolve().name) + number
        base = unicodedata.normalize("NFC", base)
        base = name = os.fsencode(base).decode("utf-8", "replace")  # Linux allows names that are no text
        if number:
            LOGGER.info("%s holds several series: %s is %s", one.series.folder, base, path.about)
        count = 2
        while name in names:
            name, count = f"{base}_{count}", count + 1
        if name != base:
            LOGGER.info("%s is called %s, since %s is called %s", path, name, names[base], base)
        names[name] = path
    return dict(sorted(names.items()))


def _series_path(one: Series, folder: Path, all_series: Sequence[Series]) -> SeriesPath:
    """Return the folder that a series is called after, or its first file where others lie there."""
    is_alone = all(other is one or not other.folder.is_relative_to(one.folder) for other in all_series)
    path = SeriesPath(folder if is_alone else one.files[0])
    path.files, path.about = one.files, about(one)
    return path


def _short_parts(one: _Found, found: Sequence[_Found]) -> tuple[str, ...]:
    """Return a file's whole path, of a series the shortest beginning that holds it alone."""
    for length in range(1, len(one.parts) if one.is_folder else 0):
        if sum(other.parts[:length] == one.parts[:length] for other in found) == 1:
            return one.parts[:length]
    return one.parts


def _number(one: _Found, found: Sequence[_Found]) -> str:
    """Return what tells a series from others of the same folder: its number, or its place among them."""
    if one.series is None:
        return ""
    beside = [other.series for other in found if other.series is not None and other.parts == one.parts]
    if len(beside) == 1:
        return ""
    numbers = [other.headers[0].number if other.headers else None for other in beside]
    is_told = None not in numbers and len(set(numbers)) == len(numbers)
    return f"_series{numbers[beside.index(one.series)] if is_told else beside.index(one.series) + 1}"


def _short(name: str) -> str:
    """Shorten a name that no file system would take, so that it stays one of its own."""
    if len(os.fsencode(name)) <= MAX_NAME:
        return name
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    return f"{name[: MAX_NAME // 4]}_{digest}"
