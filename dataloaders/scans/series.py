"""DICOM files into series: which belong together, what is left out, and a series as one array in space."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataloaders.scans.dicom import Frame, Header, guarded, read_header
from dataloaders.scans.dicom_pixels import Pixels, read_pixels
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

GAP_TOLERANCE = 0.1  # of the usual gap between two slices of a series
LINE_TOLERANCE = 0.25  # of a voxel: how far a slice may lie from where the series' steps lead
ALIKE = 1e-3  # largest difference of directions, and relative of pixel sides, within a series: rounding
FEW = 3  # images; a series of fewer beside another one is a scout
NAMED = 5  # files that a line about left-out ones names

# What is left out, and why: said of one file and of several.
NO_IMAGE = ("holds no image", "hold no image")
SINGLE = ("is a single image, no volume,", "are single images, no volumes,")
SCOUT = ("belongs to a localiser", "belong to localisers")
LeftOut = dict[tuple[str, str], list[Path]]


@dataclass(frozen=True, eq=False)
class Series:
    """Files that make one scan.

    Attributes:
        headers: of its images.
        damaged: files of the same folder that cannot be read; reading the series says so.
    """

    headers: tuple[Header, ...]
    damaged: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """Return all its files."""
        return (*(header.path for header in self.headers), *self.damaged)

    @property
    def folder(self) -> Path:
        """Return the folder that all its files lie in, somewhere."""
        return Path(os.path.commonpath([path.parent for path in self.files]))

    @property
    def count(self) -> int:
        """Count its pictures."""
        return sum(header.count for header in self.headers)


def sort_out(paths: Iterable[Path]) -> tuple[list[Series], LeftOut]:
    """Sort DICOM files into series.

    A series is told by its SeriesInstanceUID. Where files of several folders have the same one they are one series if
    they fit together, and else, as after a careless pseudonymisation, one a folder.

    Args:
        paths: DICOM files.

    Returns:
        The series, ordered by their files, and what is left out: files without an image, single images, scouts.
    """
    groups: dict[tuple, list[Header]] = {}
    left: LeftOut = {}
    damaged: list[Path] = []
    for path in paths:
        try:
            header = read_header(path)
        except UserError:
            damaged.append(path)
            continue
        if header is None:
            left.setdefault(NO_IMAGE, []).append(path)
        else:
            key = (header.series, header.is_localiser, header.patient, header.study)
            groups.setdefault(key, []).append(header)
    series = [Series(tuple(part)) for headers in groups.values() for part in _apart(headers)]
    kept = []
    for one in series:
        reason = _why_left_out(one, series)
        if reason is None:
            kept.append(one)
        else:
            left.setdefault(reason, []).extend(one.files)
    return sorted(_with_damaged(kept, damaged), key=lambda s: s.files[0]), left


def _apart(headers: Sequence[Header]) -> list[list[Header]]:
    """Divide images of the same identifiers by folder, unless those of all folders make one regular series."""
    folders: dict[Path, list[Header]] = {}
    for header in headers:
        folders.setdefault(header.path.parent, []).append(header)
    if len(folders) == 1:
        return [list(headers)]
    frames = [frame for header in headers for frame in header.frames]
    instances = {header.instance for header in headers}
    if "" in instances or len(instances) < len(headers) or len({h.shape for h in headers}) > 1 or len(frames) < FEW:
        return list(folders.values())
    try:
        ordered(headers[0].path.parent, frames)
    except UserError:
        return list(folders.values())
    return [list(headers)]


def _why_left_out(one: Series, all_series: Sequence[Series]) -> tuple[str, str] | None:
    """Return the reason to leave a series out: it is a single image, or a scout beside another series."""
    if one.count == 1:
        return SINGLE
    first = one.headers[0]
    if one.count >= FEW and not first.is_localiser:
        return None
    beside = (s for s in all_series if s.count >= FEW and not s.headers[0].is_localiser)
    is_beside = any(s.folder == one.folder or (first.study and s.headers[0].study == first.study) for s in beside)
    return SCOUT if is_beside else None


def _with_damaged(series: Sequence[Series], damaged: Sequence[Path]) -> list[Series]:
    """Add damaged files to the series of their folders, so that none is read without them; others stand alone."""
    result = []
    for one in series:
        folders = {header.path.parent for header in one.headers}
        result.append(Series(one.headers, tuple(path for path in damaged if path.parent in folders)))
    taken = {path for one in result for path in one.damaged}
    alone: dict[Path, list[Path]] = {}
    for path in damaged:
        if path not in taken:
            alone.setdefault(path.parent, []).append(path)
    return result + [Series((), tuple(paths)) for paths in alone.values()]


def tell_left_out(folder: Path, left: LeftOut) -> None:
    """Say what is left out of a folder, a line a reason."""
    for (one, several), paths in left.items():
        names = [str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path) for path in sorted(paths)]
        shown = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
        what = f"1 file that {one}" if len(names) == 1 else f"{len(names)} files that {several}"
        LOGGER.info("%s: %s left out: %s", folder, what, shown)


def read_series(
    where: Path,
    files: Sequence[Path],
    pixel_spacing_mm: tuple[float, float] | None = None,
    is_label: bool = False,
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Read the files of one series.

    Args:
        where: the series' folder or first file, for messages.
        files: all of them; none may be left out.
        pixel_spacing_mm: between rows and between columns, where the headers have no PixelSpacing.
        is_label: the pictures are a label map, in which no number stands for padding.

    Returns:
        Array (X, Y, Z), stored values × slope + intercept (of a CT in HU), padding at the least of the others; affine
        (4, 4) to mm, x to the left (LPS); the slices' files along z.

    Raises:
        UserError: a file is damaged or no picture in space, the pictures are no stack, or PixelSpacing is missing.
    """
    headers = [header for header in map(read_header, files) if header is not None]
    wrong = next((header for header in headers if header.problem), None)
    if wrong:
        raise UserError(f"{wrong.path} {wrong.problem}.")
    frames = [_with_sides(frame, pixel_spacing_mm) for header in headers for frame in header.frames]
    if len(frames) < 2:
        raise UserError(f"{where} holds no DICOM series of slices: give the folder with the scan's .dcm files.")
    _check_shapes(where, headers)
    _check_rescales(headers)
    frames, axes = ordered(where, frames)
    pictures = {header.path: guarded(header.path, lambda path, h=header: read_pixels(path, h)) for header in headers}
    array = np.stack([pictures[frame.path].values[:, :, frame.number] for frame in frames], axis=-1)
    if not is_label:
        _fill_padding(where, array, [(pictures[frame.path], frame.number) for frame in frames])
    sides = np.median([frame.sides for frame in frames], axis=0)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = axes[0] * sides[0], axes[1] * sides[1]
    affine[:3, 2] = (frames[-1].position - frames[0].position) / (len(frames) - 1)  # a tilted gantry's too
    affine[:3, 3] = frames[0].position
    return array, affine, tuple(str(frame.path) for frame in frames)


def _with_sides(frame: Frame, given: tuple[float, float] | None) -> Frame:
    """Give a picture without PixelSpacing the sides from the command line.

    Raises:
        UserError: there are none.
    """
    if frame.sides is not None:
        return frame
    if given is None:
        raise UserError(
            f"{frame.path} has no PixelSpacing, the sides of its pixels: find them in the scan's protocol and give "
            "--pixel_spacing_mm <between rows> <between columns>."
        )
    return Frame(frame.path, frame.number, frame.position, frame.axes, (float(given[1]), float(given[0])))


def _check_shapes(where: Path, headers: Sequence[Header]) -> None:
    shapes = [header.shape for header in headers]
    usual = max(sorted(set(shapes)), key=shapes.count)
    odd = next((header for header in headers if header.shape != usual), None)
    if odd:
        raise UserError(
            f"{where}: {odd.path.name} has {odd.shape[0]}×{odd.shape[1]} pixels, other images of its series "
            f"{usual[0]}×{usual[1]}: move what does not belong to the scan away, or export the series again."
        )


def _check_rescales(headers: Sequence[Header]) -> None:
    """Refuse a series of which some images have a rescale and others lack it: their values are in two units.

    Raises:
        UserError: names an image and the attribute.
    """
    for k, (name, default) in enumerate((("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))):
        known = {pair[k] for header in headers for pair in header.rescales}
        if None in known and known - {None, default}:
            without = next(header for header in headers if any(pair[k] is None for pair in header.rescales))
            raise UserError(
                f"{without.path} has no {name}, which other images of its series have: export the series again."
            )


def _fill_padding(where: Path, array: np.ndarray, pictures: Sequence[tuple[Pixels, int]]) -> None:
    """Give padding voxels (PixelPaddingValue) the least value of the others, in place, and log it."""
    padded = [(k, pixels, number) for k, (pixels, number) in enumerate(pictures) if pixels.is_padding is not None]
    if not padded:
        return
    is_padding = np.zeros(array.shape, bool)
    for k, pixels, number in padded:
        is_padding[:, :, k] = pixels.is_padding[:, :, number]
    if is_padding.all() or not is_padding.any():
        return
    air = array.min(where=~is_padding, initial=array.max())
    if not (array[is_padding] == air).all():
        LOGGER.info(
            "NOTE: %s: %.1f %% of its voxels are padding (%s) and become %g, the least of its other values",
            where, 100 * is_padding.mean(), padded[0][1].padding, air,
        )  # fmt: skip
    array[is_padding] = air


def ordered(where: Path, frames: Sequence[Frame]) -> tuple[list[Frame], np.ndarray]:
    """Order a series' pictures along their normal, and check that they are a stack.

    Directions and pixel sides that differ by rounding are alike: the median stands for all.

    Returns:
        The pictures, and their common axes (2, 3).

    Raises:
        UserError: names pictures that lie askew, unevenly far apart, or beside the line of the others.
    """
    axes = np.median([frame.axes for frame in frames], axis=0)
    known = [frame.sides for frame in frames if frame.sides is not None]
    sides = np.median(known, axis=0) if known else np.ones(2)
    for frame in frames:
        is_turned = np.abs(frame.axes - axes).max() > ALIKE
        if is_turned or (frame.sides is not None and np.abs(frame.sides / sides - 1).max() > ALIKE):
            what = "directions (ImageOrientationPatient)" if is_turned else "pixel sides (PixelSpacing)"
            raise UserError(
                f"{where}: {frame.path.name} has other {what} than most images of its series: move what does not "
                "belong to the scan away, or export the series again."
            )
    normal = np.cross(*axes)
    frames = sorted(frames, key=lambda f: float(f.position @ normal))
    _check_gaps(where, frames, normal)
    _check_line(where, frames, normal, float(min(sides)))
    return frames, axes


def _check_gaps(where: Path, frames: Sequence[Frame], normal: np.ndarray) -> None:
    """Refuse a series with slices missing, doubled or unevenly spaced."""
    gaps = np.diff([frame.position @ normal for frame in frames])
    usual = float(np.median(gaps))
    worst = int(np.abs(gaps - usual).argmax())
    if usual <= 0 or abs(gaps[worst] - usual) > GAP_TOLERANCE * usual:
        raise UserError(
            f"{where}: {frames[worst].path.name} and {frames[worst + 1].path.name} lie {gaps[worst]:.3g} mm apart, "
            f"other slices {usual:.3g} mm: a slice is missing or doubled; export the series again."
        )


def _check_line(where: Path, frames: Sequence[Frame], normal: np.ndarray, side: float) -> None:
    """Refuse slices beside the line of the others: the same step must lead from each to the next."""
    positions = np.array([frame.position for frame in frames])
    steps = np.diff(positions, axis=0)
    beside = np.linalg.norm(_in_plane(steps - np.median(steps, axis=0), normal), axis=1)
    worst = int(beside.argmax())
    if beside[worst] > LINE_TOLERANCE * side:
        raise UserError(
            f"{where}: from {frames[worst].path.name} to {frames[worst + 1].path.name} the slices jump by "
            f"{beside[worst]:.3g} mm within their plane: they are no straight stack; export the series again."
        )
    k = np.arange(len(frames))
    straight = positions[0] + np.outer(k, (positions[-1] - positions[0]) / k[-1])
    along = np.abs((positions - straight) @ normal)
    across = np.linalg.norm(_in_plane(positions - straight, normal), axis=1)
    usual = float(np.median(steps @ normal))
    off = np.maximum(along / usual, across / side)
    worst = int(off.argmax())
    if off[worst] > LINE_TOLERANCE:
        raise UserError(
            f"{where}: {frames[worst].path.name} lies {np.hypot(along[worst], across[worst]):.3g} mm from where the "
            "first and last slice put it: the slices are not evenly spaced on a line; resample the series first."
        )


def _in_plane(vectors: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Return what of vectors (N, 3) lies across a normal."""
    return vectors - np.outer(vectors @ normal, normal)
