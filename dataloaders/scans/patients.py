"""The patient of each imported case, so that all cases of a patient are on one side of the split."""

import re
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dataloaders.scans.convert import few
from dataloaders.scans.dicom import is_dicom, read_header
from dataloaders.scans.joining import Cases
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")  # BIDS
REGULAR_EXPRESSION = re.compile(r"[\\()\[\]+^$|{}]|\.\*")  # letters that a pattern of stars does not contain
LAST_PART = re.compile(r"(.*[^ _.(-])[ _.(-]+[^ _.(-]+")  # p1_s3, p1-pre, p1.1, p1 (1)
SIDE = re.compile(r"(.*\d)[LR]")  # 01L, 01R
# Folders are taken for patients' where there are several of them and most hold few cases; others are sites or batches.
FOLDERS_OF_PATIENTS, CASES_OF_A_PATIENT = 4, 5


def with_patients(cases: Cases, config: Any) -> Cases:
    """Return cases with their patients: from the table, `--patient_pattern`, BIDS names, DICOM headers or folders.

    Args:
        cases: the cases of an import; patients that a table gave stay.
        config: the header, with `images`, and `patient_pattern` or None.

    Raises:
        UserError: `--patient_pattern` is given beside a table's patients, is no pattern, or does not fit a name.
    """
    pattern = config.patient_pattern
    if cases.patients:
        if pattern is not None:
            raise UserError("--patient_pattern and the table's column patient both name patients: give one of them.")
        return cases
    if pattern is not None:
        return _told(cases, _by_pattern(cases, pattern), "--patient_pattern")
    for source, found in (
        ("sub- in their names (BIDS)", _subjects(cases, config.images)),
        ("the PatientID of their DICOM files", _dicom_patients(cases)),
        ("their folders", {} if getattr(config, "described_by", None) else _folders(cases, config.images)),
    ):
        counts = Counter(found.values())
        if not counts or max(counts.values()) < 2:
            continue
        if len(counts) == 1 and len(found) == len(cases.files):
            LOGGER.warning(
                "NOTE: all %d cases are of one patient, by %s; each case counts as a patient of its own. Name the "
                "patients by --patient_pattern or in a table.", len(found), source,
            )  # fmt: skip
            continue
        return _told(cases, {name: found.get(name, name) for name in cases.files}, source)
    _warn_of_names(cases)
    return cases


def tell_shared_patients(sides: Mapping[str, list[str]], patients: Mapping[str, str]) -> None:
    """Warn where earlier lists, or given splits, have a patient's cases on several sides.

    Args:
        sides: "train", "val" and "test" to the cases' names.
        patients: the patient of each case; a case without one is its own patient.
    """
    seen: dict[str, set[str]] = {}
    for side, names in sides.items():
        for name in names:
            seen.setdefault(patients.get(name, name), set()).add(side)
    shared = [patient for patient, there in seen.items() if len(there) > 1]
    if shared:
        LOGGER.warning(
            "WARNING: cases of one patient are on several sides of the split, which flatters a test: %s. Give "
            "--resplit to divide by patients, or correct the lists.", few(shared),
        )  # fmt: skip


def _told(cases: Cases, patients: dict[str, str], source: str) -> Cases:
    count = len(set(patients.values()))
    LOGGER.info("%d cases of %d patients, by %s; a patient's cases are on one side", len(patients), count, source)
    return replace(cases, patients=patients)


def _by_pattern(cases: Cases, pattern: str) -> dict[str, str]:
    """Return each case's patient: the pattern's first group or star, or all that it matches at the name's beginning."""
    text = pattern
    if "*" in pattern and not REGULAR_EXPRESSION.search(pattern):
        text = "(" + re.escape(pattern).replace(r"\*", ".*", 1).replace(".*", ".*)", 1).replace(r"\*", ".*")
    try:
        expression = re.compile(text)
    except re.error as error:
        raise UserError(f"--patient_pattern {pattern} is no regular expression ({error}): correct it.") from None
    patients = {}
    for name in cases.files:
        match = expression.match(name)
        patient = match and (match[1] if expression.groups else match[0])
        if not patient:
            raise UserError(f"--patient_pattern {pattern} does not fit the case {name}: it must fit every name.")
        patients[name] = patient
    return patients


def _subjects(cases: Cases, images: Path | None) -> dict[str, str]:
    """Return the BIDS subjects of the cases whose path or name has one."""
    found = {}
    for name, (paths, _) in cases.files.items():
        match = next(filter(None, (SUBJECT.match(part) for part in (*reversed(_parts(paths[0], images)), name))), None)
        if match:
            found[name] = match[0]
    return found


def _dicom_patients(cases: Cases) -> dict[str, str]:
    """Return each case's patient, named after the patient's first case so that no PatientID is stored."""
    first_case: dict[str, str] = {}
    found = {}
    for name, (paths, _) in cases.files.items():
        files = getattr(paths[0], "files", ()) or ((paths[0],) if paths[0].is_file() and is_dicom(paths[0]) else ())
        header = read_header(files[0]) if files else None
        if header is not None and header.patient:
            found[name] = first_case.setdefault(header.patient, name)
    return found


def _folders(cases: Cases, images: Path | None) -> dict[str, str]:
    """Return the top folder of each case, where there are enough of them to be patients'."""
    found = {}
    for name, (paths, _) in cases.files.items():
        parts = _parts(paths[0], images)
        if len(parts) > 1:
            found[name] = parts[0]
    counts = Counter(found.values())
    are_patients = len(counts) >= FOLDERS_OF_PATIENTS and statistics.median(counts.values()) <= CASES_OF_A_PATIENT
    if len(counts) > 1 and max(counts.values()) > 1 and not are_patients:
        LOGGER.warning(
            "NOTE: the cases lie in the folders %s. If these are patients, name them by --patient_pattern.",
            few(sorted(counts)),
        )
    return found if are_patients else {}


def _parts(path: Path, images: Path | None) -> tuple[str, ...]:
    return path.relative_to(images).parts if images is not None and path.is_relative_to(images) else (path.name,)


def _warn_of_names(cases: Cases) -> None:
    """Warn where several cases' names differ only in their last part, for several beginnings."""
    groups: dict[str, list[str]] = {}
    for name in cases.files:
        match = LAST_PART.fullmatch(name) or SIDE.fullmatch(name)
        if match:
            groups.setdefault(match[1], []).append(name)
    several = [names for names in groups.values() if len(names) > 1]
    if several and len(groups) > 1 and 2 * sum(map(len, several)) >= len(cases.files):
        first, second = several[0][:2]
        prefix = next(prefix for prefix, names in groups.items() if names is several[0])
        LOGGER.warning(
            "WARNING: names such as %s and %s may be of one patient, who can then be on both sides of the split: name "
            "the patients by --patient_pattern, such as \"%s*\", or in a table.", first, second,
            f"*{first[len(prefix)]}",
        )  # fmt: skip
