"""A prediction as a DICOM segmentation (SEG) that refers to the series it was made from."""

import re
from collections.abc import Iterable, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from dataloaders.scans.dicom import is_dicom, quiet, read_header
from dataloaders.scans.pictures import is_picture
from dataloaders.scans.prediction import Run
from dataloaders.scans.reading import LPS_TO_RAS, Scan
from dataloaders.scans.results import is_sheared, straightened
from dataloaders.scans.series import ordered
from sdcl.runs.atomic import replacing
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")
MAY_BE_EMPTY = (  # attributes that a segmentation copies, empty or not, and that some anonymisation removes
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime",
)  # fmt: skip
SEXES = ("M", "F", "O")  # that DICOM has
MAX_TEXT = 64  # letters of a DICOM long string
SERIES_NUMBER = 1000  # added to the scan's
TISSUE = ("85756007", "SCT", "Tissue")  # what a structure is said to be of which no more than its name is known


def check_are_series(scans: Iterable[Path]) -> None:
    """Refuse scans that are no DICOM series, before any prediction is spent on them.

    Raises:
        UserError: names the first; or the package that writes segmentations is not there.
    """
    if find_spec("highdicom") is None:
        raise UserError("--dicom_seg needs the package highdicom: pip install highdicom, or leave --dicom_seg out.")
    for path in scans:
        if not getattr(path, "files", ()) and (not is_dicom(path) or is_picture(path)):
            raise UserError(
                f"--dicom_seg: {path} is no DICOM series, which a DICOM segmentation refers to: leave --dicom_seg "
                "out, or predict the DICOM series apart."
            )


def read_sources(scan: Scan) -> list[pydicom.Dataset]:
    """Read the headers of a scan's files; a file of many frames is one header.

    Their geometry becomes the scan's own, without the roundings by which slices of a series differ.

    Args:
        scan: a DICOM series, as it was read.

    Raises:
        UserError: a segmentation cannot refer to them.
    """
    quiet()
    files = list(dict.fromkeys(map(Path, scan.slice_names)))
    sources = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
    for file, source in zip(files, sources, strict=True):
        lacking = next((name for name in NEEDED if not source.get(name)), None)
        if lacking:
            raise UserError(
                f"--dicom_seg: {file} has no {lacking}, by which a segmentation refers to it: leave --dicom_seg out."
            )
        for name in MAY_BE_EMPTY:
            if name not in source:
                setattr(source, name, "")
        if source.PatientSex not in SEXES:
            source.PatientSex = ""  # some write U for what DICOM leaves empty
    affine = LPS_TO_RAS @ (scan.affine if is_sheared(scan) else straightened(scan.affine))
    if len(files) == len(scan.slice_names):
        for k, source in enumerate(sources):
            source.update(_dataset(**_position(affine, k), **_orientation(affine), **_measures(affine)))
    elif len(files) == 1:
        _place_frames(sources[0], files[0], affine)
    else:
        raise UserError(
            f"--dicom_seg: {scan.path} consists of several multi-frame files, and a segmentation refers to one alone: "
            "leave --dicom_seg out."
        )
    return sources


def _position(affine: np.ndarray, k: int) -> dict[str, Any]:
    return {"ImagePositionPatient": _decimals(affine[:3, 3] + k * affine[:3, 2])}


def _orientation(affine: np.ndarray) -> dict[str, Any]:
    return {"ImageOrientationPatient": _decimals((affine[:3, :2] / np.linalg.norm(affine[:3, :2], axis=0)).T.ravel())}


def _measures(affine: np.ndarray) -> dict[str, Any]:
    columns, rows, slices = _decimals(np.linalg.norm(affine[:3, :3], axis=0))
    return {"PixelSpacing": [rows, columns], "SliceThickness": slices, "SpacingBetweenSlices": slices}


def _decimals(values: Sequence[float]) -> list[pydicom.valuerep.DSfloat]:
    """Return numbers in the 16 letters that a decimal string may have."""
    return [pydicom.valuerep.DSfloat(float(value), auto_format=True) for value in values]


def _dataset(**values: Any) -> pydicom.Dataset:
    result = pydicom.Dataset()
    for name, value in values.items():
        setattr(result, name, value)
    return result


def _place_frames(source: pydicom.Dataset, file: Path, affine: np.ndarray) -> None:
    """Write into a multi-frame file's header where each frame lies, and nothing else of the frames."""
    frames, _ = ordered(file, read_header(file).frames)
    source.SharedFunctionalGroupsSequence = [
        _dataset(
            PlaneOrientationSequence=[_dataset(**_orientation(affine))],
            PixelMeasuresSequence=[_dataset(**_measures(affine))],
        )
    ]
    groups = {
        f.number: _dataset(PlanePositionSequence=[_dataset(**_position(affine, k))]) for k, f in enumerate(frames)
    }
    source.PerFrameFunctionalGroupsSequence = [groups[number] for number in sorted(groups)]


def save_segmentation(
    path: Path, scan: Scan, classes: np.ndarray, sources: Sequence[pydicom.Dataset], run: Run
) -> None:
    """Write classes as a binary DICOM segmentation, a segment a class, that appears only when complete.

    Args:
        path: of the file.
        scan: gives the grid, which is the sources' or, for a tilted gantry, an upright one.
        classes: (X, Y, Z), 0 for background; class k becomes the segment k.
        sources: from read_sources().
        run: names the classes, and itself as what made it.

    Raises:
        UserError: what the sources' headers say cannot stand in a segmentation.
    """
    quiet()
    try:
        segmentation = _segmentation(scan, classes, sources, run)
        with replacing(path) as temporary:
            segmentation.save_as(temporary)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(
            f"{path} cannot be written, the NIfTI file is there ({_without_name(error, sources[0])}): correct the "
            f"headers of {scan.path}, or leave --dicom_seg out."
        ) from None


def _without_name(error: Exception, source: pydicom.Dataset) -> str:
    """Return an error's first line; a library's may quote the patient's name, whose parts are then left out."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    name = str(source.get("PatientName") or "")
    for part in sorted({name, *re.split(r"[\^=\s]+", name)} - {""}, key=len, reverse=True):
        text = text.replace(part, "...")
    return text[:160]


def _segmentation(scan: Scan, classes: np.ndarray, sources: Sequence[pydicom.Dataset], run: Run) -> pydicom.Dataset:
    import highdicom  # which takes half a second, needed for --dicom_seg alone

    first, maker = sources[0], run.folder.resolve().name[:MAX_TEXT]
    affine = LPS_TO_RAS @ straightened(scan.affine)
    volume = highdicom.Volume(
        np.ascontiguousarray(classes.transpose(2, 1, 0), np.uint8),  # (slices, rows, columns)
        affine[:, [2, 1, 0, 3]],
        coordinate_system="PATIENT",
        frame_of_reference_uid=first.FrameOfReferenceUID,
    )
    return highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=volume,
        segmentation_type="BINARY",
        segment_descriptions=_segments(run, maker),
        series_instance_uid=highdicom.UID(),
        series_number=SERIES_NUMBER + int(first.get("SeriesNumber") or 0),
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="SDCL",
        manufacturer_model_name="sdcl-segmentation",
        software_versions=_version(),
        device_serial_number=maker,
        content_label="SEGMENTATION",
        series_description=maker,
        specific_character_set="ISO_IR 192",  # UTF-8, which holds every name
    )


def _segments(run: Run, maker: str) -> list[Any]:
    """Describe the run's classes as segments."""
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentDescription
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    how = AlgorithmIdentificationSequence(maker, codes.DCM.ArtificialIntelligence, _version())
    described = []
    for number, name in enumerate(run.class_names, start=1):
        label = name.replace("\\", "/")[:MAX_TEXT]
        if label != name:
            LOGGER.info("NOTE: the segment %d is called %s, for %s is no name that DICOM takes", number, label, name)
        tissue = CodedConcept(*TISSUE)
        described.append(SegmentDescription(number, label, tissue, tissue, "AUTOMATIC", how))
    return described


def _version() -> str:
    try:
        return metadata.version("sdcl-segmentation")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "unknown"
