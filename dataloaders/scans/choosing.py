"""Which of the DICOM series below a folder `--series` means: by the identifier, its beginning, or the description."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dataloaders.scans.series import Series
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

SHOWN = 20  # series that a listing has at most


def about(one: Series) -> str:
    """Return what tells a series from others: number, description, size, identifier."""
    if not one.headers:
        return f"{len(one.files)} files that cannot be read"
    first = one.headers[0]
    number = "no number" if first.number is None else f"number {first.number}"
    description = f'"{first.description}"' if first.description else "no description"
    return f"{number}, {description}, {first.shape[0]}×{first.shape[1]}×{one.count}, {first.series or 'no UID'}"


def listing(lines: Sequence[str]) -> str:
    """Return series below each other, each on a line of its own, to follow a sentence."""
    more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "".join(f"\n{line}" for line in [*(f"  {line}" for line in lines[:SHOWN]), *more])


def chosen(folder: Path, series: Sequence[Series], wanted: str) -> list[Series]:
    """Return the series that `--series` means; folders of which none is meant are told.

    A whole SeriesInstanceUID counts before beginnings; a description counts whatever its capitals, its stars stand for
    any letters.

    Args:
        folder: below which they lie.
        series: all of them.
        wanted: what `--series` says.

    Raises:
        UserError: it means none, or says nothing.
    """
    text = wanted.strip()
    if not text:
        raise UserError("--series is empty: give a SeriesInstanceUID, its beginning, or a SeriesDescription.")
    described = re.compile(".*".join(map(re.escape, text.casefold().split("*"))), re.DOTALL)
    is_uid = bool(re.fullmatch(r"[\d.]*\.[\d.]*", text))
    whole = [one for one in series if one.headers and one.headers[0].series == text]
    fitting = whole or [
        one for one in series
        if one.headers
        and (described.fullmatch(one.headers[0].description.casefold())
             or (is_uid and one.headers[0].series.startswith(text)))
    ]  # fmt: skip
    if not fitting:
        there = listing([f"{one.folder}: {about(one)}" for one in series]) or " no series"
        raise UserError(f"--series {wanted} fits no series below {folder}: give one that is there (* stands for any "
                        f"letters):{there}")  # fmt: skip
    tops = {one: one.folder.relative_to(folder).parts[:1] for one in series}
    for top in sorted({*tops.values()} - {tops[one] for one in fitting}):
        lines = listing([about(one) for one in series if tops[one] == top])
        LOGGER.info("NOTE: %s: left out, --series %s fits none of its series:%s", folder.joinpath(*top), wanted, lines)
    return fitting


def check_one_each(images: Path, found: Mapping[str, Path], series: str) -> None:
    """Refuse several series of one patient, which would become several cases.

    Args:
        images: the folder whose folders are the patients'.
        found: name to series (finding.SeriesPath).
        series: what `--series` says.

    Raises:
        UserError: lists them.
    """
    patients: dict[Path, list[Path]] = {}
    for path in found.values():
        folder = Path(os.path.commonpath([file.parent for file in path.files]))
        patients.setdefault(images.joinpath(*folder.relative_to(images).parts[:1]), []).append(path)
    for patient, fitting in patients.items():
        if len(fitting) > 1:
            raise UserError(
                f"--series {series} fits {len(fitting)} series of {patient}: give one that fits a single series of "
                f"each patient, or name the cases in a --table:{listing([path.about for path in fitting])}"
            )
