"""The scans below a folder: files and DICOM series at any depth, each with a name; what is left out is told."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataloaders.scans.dicom import is_dicom
from dataloaders.scans.pictures import PICTURES, is_picture
from dataloaders.scans.series import LeftOut, Series, sort_out, tell_left_out
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

NIFTI = (".nii", ".nii.gz")
PAIR = (".hdr",)  # with an .img beside it
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
MGH = (".mgz", ".mgh")  # FreeSurfer's
SUFFIXES = (*NIFTI, *ITK, *MGH)
PIXELS_OF = {".raw": ITK, ".zraw": ITK, ".raw.gz": ITK, ".img": PAIR, ".img.gz": PAIR}  # whose header is beside them
NO_SCAN = ("is of no format that is read here", "are of no format that is read here")
PICTURE = ("is a picture beside scans", "are pictures beside scans")
NO_FILE = ("cannot be opened", "cannot be opened")
MAX_NAME = 150  # bytes; file systems allow 255, and predictions add to it


class SeriesPath(type(Path())):
    """A DICOM series: the path of the folder that it is called after, or of its first file where that holds more.

    Attributes:
        files: all files of the series.
    """

    files: tuple[Path, ...] = ()


@dataclass(frozen=True, eq=False)
class _Found:
    """A scan and its place below the folder: of a file the last of `parts` is its name, of a series its folder's."""

    parts: tuple[str, ...]
    file: Path | None = None
    series: Series | None = None


def suffix_of(path: Path, suffixes: Sequence[str] = (*SUFFIXES, *PAIR, *PICTURES)) -> str:
    """Return the longest of some suffixes that a file's name ends with, in any case; "" for none."""
    name = path.name.lower()
    return next((s for s in sorted(suffixes, key=len, reverse=True) if name.endswith(s) and name != s), "")


def name_of(path: Path) -> str:
    """Return a scan's name: the file's without its suffix, or the folder's."""
    suffix = suffix_of(path)
    return path.name[: len(path.name) - len(suffix)] if suffix and path.is_file() else path.name


def find_scans(folder: Path) -> dict[str, Path]:
    """Find the scans below a folder: files and DICOM series, at any depth; what is left out is logged.

    Pictures (PNG, TIFF ...) are scans where there are no others, and else previews of them, left out.

    A file is called after its path below the folder, joined by `_`; a series after the shortest part of its path that
    holds no other scan, or after the folder itself where that is the series; several of one folder by their number.

    Returns:
        Name to file or series, sorted by name; the values of series are SeriesPath.

    Raises:
        UserError: there is none, or two files beside each other have the same name.
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
            left.setdefault(NO_SCAN, []).append(path)
    series, without = sort_out(dicoms)
    if files or series:
        left |= {PICTURE: pictures} if pictures else {}
    else:
        files = pictures
    tell_left_out(folder, without | left)
    if not files and not series:
        raise UserError(
            f"{folder} holds no scans: expected {', '.join(SUFFIXES)} files, pictures or folders of DICOM series there."
        )
    _check_twins(files)
    found = [_Found((*path.parent.relative_to(folder).parts, name_of(path)), file=path) for path in files]
    found += [_Found(one.folder.relative_to(folder).parts, series=one) for one in series]
    return _named(folder, found)


def is_scan_file(path: Path) -> bool:
    """Tell whether a file's name is that of a scan."""
    if suffix_of(path, PAIR):
        return path.with_suffix(".img").exists() or path.with_suffix(".img.gz").exists()
    return bool(suffix_of(path, SUFFIXES))


def _is_part(path: Path) -> bool:
    """Tell whether a file holds the voxels of a header beside it."""
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


def _named(folder: Path, found: Sequence[_Found]) -> dict[str, Path]:
    """Give each scan a name of its own, the same whenever the folder holds the same."""
    names: dict[str, Path] = {}
    for one in sorted(found, key=lambda f: (f.series is not None, f.parts, f.file or f.series.files[0])):
        parts = _short_parts(one, found)
        path = one.file or _series_path(one, folder.joinpath(*parts), found)
        base = _short("_".join(parts) or folder.resolve().name) + _number(one, found)
        base = name = os.fsencode(base).decode("utf-8", "replace")  # Linux allows names that are no text
        number = 2
        while name in names:
            name, number = f"{base}_{number}", number + 1
        if name != base:
            LOGGER.info("%s is called %s, since %s is called %s", path, name, names[base], base)
        names[name] = path
    return dict(sorted(names.items()))


def _series_path(one: _Found, folder: Path, found: Sequence[_Found]) -> SeriesPath:
    """Return the folder that a series is called after, or its first file where others lie there."""
    below = one.series.folder
    is_alone = all(other is one or not other.series.folder.is_relative_to(below) for other in found if other.series)
    path = SeriesPath(folder if is_alone else one.series.files[0])
    path.files = one.series.files
    return path


def _short_parts(one: _Found, found: Sequence[_Found]) -> tuple[str, ...]:
    """Return a file's whole path, of a series the shortest beginning that holds it alone."""
    for length in range(1, len(one.parts) if one.series else 0):
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
