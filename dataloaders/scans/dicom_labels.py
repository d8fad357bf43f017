"""DICOM segmentations (SEG) as labels: each frame on its own place, segments by their number; contours are refused."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom import uid as uids

from dataloaders.checks import check_declared
from dataloaders.scans.dicom import (
    LABEL_MAP,
    Frame,
    check_lengths,
    dicom_files,
    frame_attribute,
    frame_of,
    guarded,
    is_dicom,
    quiet,
    undecodable,
)
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

SEGMENTATIONS = (uids.SegmentationStorage, LABEL_MAP)
CONTOURS = uids.RTStructureSetStorage
ON_GRID = 0.1  # of a voxel's smallest side: how far a frame's corners may lie from the image's voxels


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What a DICOM segmentation says.

    Attributes:
        path: of its file.
        pictures: (count, columns, rows), uint16: the segments' numbers, 0 for none, frames of one place in one.
        frames: where they lie.
    """

    path: Path
    pictures: np.ndarray
    frames: tuple[Frame, ...]

    def stacked(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the pictures as they follow each other, (X, Y, count), and an affine to mm, LPS.

        A segmentation holds the slices alone that have a segment: the distance between two is where gaps are unknown.
        """
        normal = np.cross(*self.frames[0].axes)
        order = sorted(range(len(self.frames)), key=lambda k: float(self.frames[k].position @ normal))
        first, last = self.frames[order[0]], self.frames[order[-1]]
        affine = _affine_of(first)
        if len(order) > 1:
            affine[:3, 2] = (last.position - first.position) / (len(order) - 1)
        return np.ascontiguousarray(self.pictures[order].transpose(1, 2, 0)), affine

    def on_grid(self, where: Path, shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
        """Lay the pictures on an image's grid; where there is none, the label is 0.

        Args:
            where: the image, for messages.
            shape: of the grid (X, Y, Z).
            affine: (4, 4), from its indices to mm, LPS.

        Returns:
            uint16 (X, Y, Z).

        Raises:
            UserError: pictures do not lie on the grid's voxels, or segments reach beyond it.
        """
        label = np.zeros(tuple(shape), np.uint16)
        side = float(np.linalg.norm(affine[:3, :3], axis=0).min())
        for picture, frame in zip(self.pictures, self.frames, strict=True):
            change = np.linalg.inv(affine) @ _affine_of(frame)
            corners = change @ _corners(picture.shape)  # (4, 4): homogeneous, a corner a column
            steps = change[:3, :2].round()
            nearest = steps @ _corners(picture.shape)[:2] + change[:3, 3:].round()
            beside = np.linalg.norm(affine[:3, :3] @ (corners[:3] - nearest), axis=0).max()
            if beside > ON_GRID * side or (np.abs(steps).sum(axis=0) != 1).any():
                raise UserError(
                    f"{self.path} lies beside the voxels of {where}, by up to {beside:.3g} mm: give the segmentation "
                    "of this series, or resample it onto the image."
                )
            filled = np.argwhere(picture)  # (count, 2)
            there = (filled @ steps.T + change[:3, 3].round()).astype(int)
            if ((there < 0) | (there >= np.array(shape))).any():
                raise UserError(
                    f"{self.path} has segments beyond {where}: give the segmentation of this series, or the whole scan."
                )
            before, now = label[tuple(there.T)], picture[tuple(filled.T)]
            if ((before > 0) & (before != now)).any():
                raise UserError(
                    f"{self.path} has frames of different segments in the same voxels of {where}, and a voxel has one "
                    "label: export the segments apart, without the voxels that both have."
                )
            label[tuple(there.T)] = now
        return label


def _affine_of(frame: Frame) -> np.ndarray:
    """Return the affine of a picture's indices to mm, LPS; its third axis is 1 mm along the normal."""
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([*(frame.axes * np.array(frame.sides)[:, None]), np.cross(*frame.axes)])
    affine[:3, 3] = frame.position
    return affine


def _corners(shape: Sequence[int]) -> np.ndarray:
    """Return a picture's corners in its indices, (x, y, 0, 1), one a column."""
    columns, rows = shape[0] - 1, shape[1] - 1
    return np.array([[0, 0, 0, 1], [columns, 0, 0, 1], [0, rows, 0, 1], [columns, rows, 0, 1]], float).T


def kind_of(path: Path) -> str:
    """Return the kind (SOP class) of a DICOM file; "" where that cannot be read."""
    quiet()
    try:
        data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SOPClassUID"])
        return str(data.get("SOPClassUID") or data.file_meta.get("MediaStorageSOPClassUID") or "")
    except Exception:  # noqa: BLE001 - who reads it as an image says what is the matter with it
        return ""


def holds_segmentation(folder: Path) -> bool:
    """Tell whether there is a DICOM segmentation below a folder."""
    return any(kind_of(path) in SEGMENTATIONS for path in dicom_files(folder))


def refusal_of_contours(path: Path) -> UserError:
    """Return what is said of a radiotherapy structure set that is to be a label."""
    return UserError(
        f"{path} holds contours (RTSTRUCT), no voxels: convert it to NIfTI or DICOM SEG, with plastimatch or 3D "
        "Slicer, or move it away, and its scan counts as unlabelled."
    )


def segmentation_in(path: Path) -> Path | None:
    """Return the DICOM segmentation that a label's path means: the file itself, or the only one of a folder.

    Returns:
        Its file; None where the label is of another kind.

    Raises:
        UserError: it holds contours alone, or a folder several segmentations.
    """
    if getattr(path, "files", ()):  # a series of images
        return None
    if path.is_file():
        kind = kind_of(path) if is_dicom(path) else ""
        if kind == CONTOURS:
            raise refusal_of_contours(path)
        return path if kind in SEGMENTATIONS else None
    kinds = {file: kind_of(file) for file in dicom_files(path)}
    found = [file for file, kind in kinds.items() if kind in SEGMENTATIONS]
    contours = next((file for file, kind in kinds.items() if kind == CONTOURS), None)
    if contours is not None and not found:
        raise refusal_of_contours(contours)
    if len(found) > 1:
        raise UserError(
            f"{path} holds {len(found)} segmentations ({found[0].name}, {found[1].name}): leave one of them there."
        )
    if found and len(kinds) > 1:
        LOGGER.info("%s: of %d DICOM files the segmentation %s is the label", path, len(kinds), found[0].name)
    return found[0] if found else None


def segment_names(path: Path) -> dict[int, str]:
    """Return what a segmentation calls its segments, by their numbers.

    Raises:
        UserError: the file is damaged.
    """
    return guarded(path, lambda file: _names(pydicom.dcmread(file, specific_tags=["SegmentSequence"])))


def _names(data: pydicom.Dataset) -> dict[int, str]:
    segments = data.get("SegmentSequence") or ()
    return {int(one.SegmentNumber): str(one.get("SegmentLabel") or "").strip() for one in segments}


def read_segmentation(path: Path) -> Segmentation:
    """Read a DICOM segmentation (SEG): binary, a label map, or fractional, of which at least one half counts.

    Raises:
        UserError: it is damaged, does not say where its frames lie, or its segments overlap.

    Source: DICOM PS3.3 A.51 and C.8.20 (segmentation).
    """
    return guarded(path, _read)


def _read(path: Path) -> Segmentation:
    check_lengths(path)
    quiet()
    data = pydicom.dcmread(path)
    count = int(data.get("NumberOfFrames") or 1)
    kind = str(data.get("SegmentationType"))
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        raise UserError(f"{path} is a segmentation of the type {kind}, which is not read here: export it as binary.")
    try:
        frames = [frame_of(path, data, number, count) for number in range(count)]
        is_placed = all(frame.sides for frame in frames)
    except (KeyError, AttributeError, IndexError):
        is_placed = False
    if not is_placed:
        raise UserError(f"{path} does not say where its {count} frames lie: export the segmentation again.")
    shape = (int(data.Columns), int(data.Rows), len(set(map(_place_of, frames))))  # frames of one place become one
    check_declared(path, "its header", shape, 1, path.stat().st_size)
    if kind == "FRACTIONAL":
        LOGGER.info("%s is fractional: a segment is where it reaches one half", path)
    return _merged(path, data, frames, kind)


def _place_of(frame: Frame) -> tuple[float, ...]:
    """Return a frame's place, by which those of several segments are told to be one."""
    return (*frame.position.round(2).tolist(), *frame.axes.ravel().round(3).tolist())


def _merged(path: Path, data: pydicom.Dataset, frames: Sequence[Frame], kind: str) -> Segmentation:
    """Lay the frames of each place over one another.

    Raises:
        UserError: segments overlap, or pixels cannot be decoded.
    """
    places: dict[tuple[float, ...], int] = {}  # to the picture's number
    kept: list[Frame] = []
    pictures: list[np.ndarray] = []
    half = float(data.get("MaximumFractionalValue") or 255) / 2
    for frame, values in zip(frames, _decoded(path, data), strict=True):
        if kind == "LABELMAP":
            picture = values.T.astype(np.uint16)
        else:
            number = frame_attribute(data, frame.number, "SegmentIdentificationSequence", "ReferencedSegmentNumber")
            is_there = values.T >= half if kind == "FRACTIONAL" else values.T > 0
            picture = is_there.astype(np.uint16) * np.uint16(number)
        place = _place_of(frame)
        if place not in places:
            places[place] = len(pictures)
            kept.append(frame)
            pictures.append(picture)
            continue
        there = pictures[places[place]]
        both = (there > 0) & (picture > 0) & (there != picture)
        if both.any():
            names, numbers = _names(data), (int(there[both][0]), int(picture[both][0]))
            one, other = (f"{number} ({names.get(number) or 'no name'})" for number in numbers)
            raise UserError(
                f"{path}: its segments {one} and {other} overlap, and a voxel has one label: export them apart, "
                "without the voxels that both have."
            )
        np.maximum(there, picture, out=there)
    return Segmentation(path, np.stack(pictures), tuple(kept))


def _decoded(path: Path, data: pydicom.Dataset) -> Iterator[np.ndarray]:
    """Yield a file's frames (rows, columns), as they are stored."""
    try:
        yield from pydicom.pixels.iter_pixels(data, raw=True)
    except (RuntimeError, ValueError, AttributeError, NotImplementedError):
        raise undecodable(path, data.file_meta.TransferSyntaxUID) from None
