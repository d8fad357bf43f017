"""DICOM files into series: which belong together, what is left out, and a series as one array in space."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dataloaders.scans.dicom import MARKS, Frame, Header, guarded, read_header
from dataloaders.scans.dicom_pixels import Pixels, read_pixels
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

GAP_TOLERANCE = 0.1  # of the usual gap between two slices of a series
LINE_TOLERANCE = 0.25  # of a voxel: how far a slice may lie from where the series' steps lead
ALIKE = 1e-3  # largest difference of directions, and relative of pixel sides, within a series: rounding
FEW = 3  # images; a series of fewer beside another one is a scout
MOST_SPREAD = 0.2  # of the gap between places: pictures of one place lie within it
SAME_PLACE = 0.05  # of the usual gap between places: pictures nearer than this lie at one
WIDER = 1.5  # times the gap between all slices: the least gap between those of one of two interleaved acquisitions
OVERLAP = 1.2  # times the gap between all slices: slices beyond this thickness overlap
MOST_PARTS = 20  # acquisitions of a series
FEW_GAPS = 0.1  # of the gaps: up to so many wide ones are missing slices, more are variable spacing
RESAMPLE = "dcm2niix writes an evenly spaced copy (its name ends with _Eq), which can be read; or resample in 3D Slicer"
NAMED = 20  # files that a line about left-out ones names

# What is left out, and why: said of one file and of several.
NO_IMAGE = ("holds no image", "hold no image")
SINGLE = ("is a single image, no volume,", "are single images, no volumes,")
CAPTURE = ("is a secondary capture, no slice of the scan,", "are secondary captures, no slices of the scan,")
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
    series = []
    for headers in groups.values():
        headers, captures = _without_captures(headers)
        if captures:
            left.setdefault(CAPTURE, []).extend(header.path for header in captures)
        series += [Series(tuple(part)) for same in _apart(headers) for part in _acquisitions(same)]
    kept = []
    for one in series:
        reason = _why_left_out(one, series)
        if reason is None:
            kept.append(one)
        else:
            left.setdefault(reason, []).extend(one.files)
    return sorted(_with_damaged(kept, damaged), key=lambda s: s.files[0]), left


def _without_captures(headers: Sequence[Header]) -> tuple[list[Header], list[Header]]:
    """Divide images of the same identifiers into those of the scan and the secondary captures beside them.

    A folder that holds several captures and no slice may be a patient of its own, and stays.
    """
    placed = {header.image_type for header in headers if header.frames and not header.is_capture}
    found = [h for h in headers if h.is_capture or (_is_screen(h) and h.image_type not in placed)]
    slices = [header for header in headers if header not in found]
    if sum(header.count for header in slices) < FEW:
        return list(headers), []
    folders = {header.path.parent for header in slices}
    alone = Counter(header.path.parent for header in found if header.path.parent not in folders)
    captures = [header for header in found if alone[header.path.parent] < FEW]
    return [header for header in headers if header not in captures], captures


def _is_screen(header: Header) -> bool:
    """Tell whether an image that lies nowhere in space says that it was made from others, such as a dose report."""
    return not header.frames and ("SECONDARY" in header.image_type[1:2] or "SCREEN SAVE" in header.image_type)


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
    is_report = all(header.is_capture and not header.frames for header in one.headers)
    if one.count >= FEW and not first.is_localiser and not is_report:
        return None
    beside = [s for s in all_series if s is not one and s.count >= FEW and not s.headers[0].is_localiser]
    if is_report and one.count >= FEW:
        return CAPTURE if any(s.folder == one.folder for s in beside) else None
    is_beside = any(s.folder == one.folder or (first.study and s.headers[0].study == first.study) for s in beside)
    return (CAPTURE if is_report else SCOUT) if is_beside else None


def _acquisitions(headers: Sequence[Header]) -> list[list[Header]]:
    """Divide a series whose slices lie between those of another acquisition; each part is a regular stack."""
    if any(header.problem for header in headers):
        return [list(headers)]
    frames = [frame for header in headers for frame in header.frames]
    mark, parts = interleaved(frames)
    owners = {frame.path: k for k, part in enumerate(parts) for frame in part}
    if len(parts) < 2 or any(owners[frame.path] != k for k, part in enumerate(parts) for frame in part):
        return [list(headers)]
    LOGGER.info(
        "NOTE: %s: its slices are of %d acquisitions (by %s), with interleaved slices; they are read "
        "as %d scans", headers[0].path.parent, len(parts), mark, len(parts),
    )  # fmt: skip
    return [[header for header in headers if owners[header.path] == k] for k in range(len(parts))]


def interleaved(frames: Sequence[Frame]) -> tuple[str, list[list[Frame]]]:
    """Find acquisitions whose slices lie between one another's.

    Pictures belong to several acquisitions if an attribute, or the order of InstanceNumber, divides them into regular
    stacks of the same extent, each with gaps wider than those between all slices, and if the slices of all overlap or
    are unevenly spaced. MRI that was measured in two passes but whose slices do not overlap is one acquisition.

    Returns:
        What tells them apart, and each one's pictures; "" and no parts where there is one acquisition.
    """
    if len(frames) < 2 * FEW:
        return "", []
    normal = np.cross(*np.median([frame.axes for frame in frames], axis=0))
    place = {id(frame): float(frame.position @ normal) for frame in frames}
    gaps = np.diff(sorted(place.values()))
    usual = float(np.median(gaps))
    if usual <= 0 or gaps.min() < SAME_PLACE * usual:
        return "", []  # several pictures of one place: ordered() says what they are
    is_even = _is_regular(gaps)
    known = [frame.step_mm for frame in frames if frame.step_mm is not None]
    overlaps = not is_even or (len(known) == len(frames) and min(known) > OVERLAP * usual)
    for name in (*(mark for mark, _, _ in MARKS), "InstanceNumber"):
        parts = _runs(frames, place) if name == "InstanceNumber" else _by_mark(frames, name)
        is_unknown = not known and name != "InstanceNumber"
        if not 2 <= len(parts) <= MOST_PARTS or not (overlaps or is_unknown):
            continue
        places = [sorted(place[id(frame)] for frame in part) for part in parts]
        if min(map(len, places)) < FEW:
            continue
        steps = [np.diff(one) for one in places]
        begins, ends = max(one[0] for one in places), min(one[-1] for one in places)
        has_one_extent = ends - begins > 0.5 * (max(place.values()) - min(place.values()))
        if has_one_extent and all(_is_regular(step) and np.median(step) >= WIDER * usual for step in steps):
            return name, parts
    return "", []


def _is_regular(gaps: np.ndarray) -> bool:
    usual = float(np.median(gaps))
    return usual > 0 and bool(np.abs(gaps - usual).max() <= GAP_TOLERANCE * usual)


def _by_mark(frames: Sequence[Frame], name: str) -> list[list[Frame]]:
    parts: dict[str, list[Frame]] = {}
    for frame in frames:
        parts.setdefault(dict(frame.marks).get(name, ""), []).append(frame)
    return list(parts.values())


def _runs(frames: Sequence[Frame], place: dict[int, float]) -> list[list[Frame]]:
    """Divide pictures, in the order of their numbers, wherever they turn back."""
    if any(frame.instance is None for frame in frames):
        return []
    numbered = sorted(frames, key=lambda frame: (frame.instance, frame.number))
    steps = np.sign(np.diff([place[id(frame)] for frame in numbered]))
    forward = np.sign(steps.sum())
    parts = [[numbered[0]]]
    for frame, step in zip(numbered[1:], steps, strict=True):
        if step != forward:
            parts.append([])
        parts[-1].append(frame)
    return parts


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
    return replace(frame, sides=(float(given[1]), float(given[0])))


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
        lossy = next((pixels.padding for pixels, _ in pictures if pixels.padding), "")
        if lossy:
            LOGGER.info("NOTE: %s: its padding (%s) is left as stored, since its compression is lossy", where, lossy)
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


def _widest_group(places: np.ndarray, wide: float) -> float:
    """Return the largest extent, in mm, of neighbouring places without a wide gap between them."""
    ends = [0, *(np.flatnonzero(np.diff(places) > SAME_PLACE * wide) + 1), len(places)]
    return max(float(places[end - 1] - places[first]) for first, end in zip(ends, ends[1:], strict=False))


def _check_gaps(where: Path, frames: Sequence[Frame], normal: np.ndarray) -> None:
    """Refuse a series that is no evenly spaced stack, and say what it is instead.

    Raises:
        UserError: several pictures lie at one place, or slices are missing, unevenly spaced, or of two acquisitions.
    """
    mark, parts = interleaved(frames)
    if parts:
        raise UserError(
            f"{where} holds {len(parts)} acquisitions (by {mark}), with interleaved slices: export each "
            "as a series of its own."
        )
    places = np.array([frame.position @ normal for frame in frames])
    gaps = np.diff(places)
    usual = float(np.median(gaps))
    if usual > 0 and np.abs(gaps - usual).max() <= GAP_TOLERANCE * usual:
        return
    wide = float(np.median(gaps[gaps > SAME_PLACE * gaps.max()])) if gaps.max() > 0 else 0.0
    apart = gaps[gaps > 1e-3]  # mm
    if len(apart) and _widest_group(places, wide) > MOST_SPREAD * wide:  # one large gap, not pictures of one place
        wide = float(np.median(apart))
    if wide < 1e-3:
        raise UserError(
            f"{where}: {_name(frames[0])} and {_name(frames[1])} lie 0 mm apart, and so do all {len(frames)} "
            f"pictures: they are a cine or time series of one place{_difference([frames])}, no volume. Export the "
            "volume, or a single time point of it."
        )
    ends = [0, *(np.flatnonzero(gaps > SAME_PLACE * wide) + 1), len(frames)]
    groups = [frames[first:end] for first, end in zip(ends, ends[1:], strict=False)]
    counts = [len(group) for group in groups]
    if sum(count > 1 for count in counts) > len(counts) / 2:
        most = Counter(counts).most_common(1)[0][0]
        each = f"{most} pictures at each" if min(counts) == max(counts) else f"1 to {max(counts)} pictures at each"
        raise UserError(
            f"{where} holds {each} of its {len(groups)} places: several phases, time points or echoes"
            f"{_difference(groups)}. Export each as a series of its own, and give the one that you mean."
        )
    worst = int(np.abs(gaps - wide).argmax())
    text = (
        f"{where}: {_name(frames[worst])} and {_name(frames[worst + 1])} lie {gaps[worst]:.3g} mm apart, other slices "
        f"{wide:.3g} mm"
    )
    if max(counts) > 1:
        raise UserError(f"{text}: a slice is doubled; move one of the two files away, or export the series again.")
    times = gaps / wide
    is_wide = times > 1 + GAP_TOLERANCE
    is_whole = (np.abs(times - times.round()) <= GAP_TOLERANCE * times.round()).all()
    if is_whole and is_wide.sum() <= max(1, FEW_GAPS * len(gaps)):
        count = int((times.round() - 1).sum())
        raise UserError(
            f"{text}: {count} slice{'s are' if count > 1 else ' is'} missing; copy or export the series again."
        )
    raise UserError(f"{text}: variable slice spacing ({gaps.min():.3g} to {gaps.max():.3g} mm). {RESAMPLE}.")


def _name(frame: Frame) -> str:
    """Return a picture's file, and its number in a file of several."""
    return f"frame {frame.number + 1} of {frame.path.name}" if frame.is_one_of_many else frame.path.name


def _difference(groups: Sequence[Sequence[Frame]]) -> str:
    """Return which attribute tells pictures of one place apart, to follow what they are."""
    for name, _, _ in MARKS:
        values = [[dict(frame.marks).get(name) for frame in group] for group in groups]
        if all(len(set(one)) == len(one) for one in values):
            return f" (they differ in {name})"
    return ""


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
