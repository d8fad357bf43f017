"""Checksums of a test's cases and references, and its settings: its cases, their references and its settings."""

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdcl.runs.errors import UserError
from sdcl.runs.folder import differing_settings, settings_of_test
from sdcl.scoring.evaluation import Case

SHOWN = 5  # runs or cases that a message names


def fingerprint_of(cases: Sequence[Case], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return checksums of a test's cases and references, with the test's settings.

    Args:
        cases: the volumes that are scored.
        facts: the content of summary.json; see sdcl.runs.experiment.test().
    """
    images, references = {}, {}
    for case in cases:  # once: reading a case may decode its file
        images[case.name], references[case.name] = _checksum(case.image), _checksum(case.label, case.spacing)
    return {
        "images": images,
        "references": references,
        "settings": settings_of_test(facts.get("config", {})) | {"split": facts.get("split")},
    }


def _checksum(array: np.ndarray, *more: Any) -> str:
    total = hashlib.sha256(f"{array.shape} {array.dtype} {more}".encode())
    total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()[:16]


def read_fingerprint(folder: Path) -> dict[str, Any]:
    """Read what a test's summary.json and cases.csv tell of its cases, references and settings.

    A test of an earlier version has no checksums. The volumes of its references, which its cases.csv holds, stand for
    them.

    Args:
        folder: the test's results.
    """
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    known = summary.get("fingerprint") or {}
    settings = settings_of_test(summary.get("config", {})) | {"split": summary.get("split")}
    cases: dict[str, None] = {}
    by_predictor: dict[str, set[str]] = {}
    volumes: dict[str, dict[str, str]] = {}
    with open(folder / "cases.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            cases[row["case"]] = None
            by_predictor.setdefault(row["predictor"], set()).add(row["case"])
            if row.get("reference_voxels"):
                volumes.setdefault(row["case"], {})[row["structure"]] = row["reference_voxels"]
    return {
        "images": known.get("images"), "references": known.get("references"), "settings": settings,
        "cases": sorted({*cases, *(known.get("references") or ())}), "volumes": volumes,
        "lacking": sorted({*cases, *(known.get("references") or ())} - set.intersection(*by_predictor.values()))
        if by_predictor else [],
    }  # fmt: skip


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say how two tests differ, from read_fingerprint(); nothing where they are alike, as far as both tell."""
    found = [f"{case} is missing" for case in sorted(set(now["cases"]) - set(there["cases"]))]
    found += [f"{case} is not in the other" for case in sorted(set(there["cases"]) - set(now["cases"]))]
    both = [case for case in there["cases"] if case in now["cases"]]
    for name, title in (("references", "reference"), ("volumes", "reference"), ("images", "image")):
        one, other = (each[name] or {} for each in (there, now))
        found += [f"another {title} of {c}" for c in both if c in one and c in other and one[c] != other[c]]
    if settings := differing_settings(there["settings"], now["settings"]):
        found.append(settings)
    return list(dict.fromkeys(found))


def check_alike(folders: Mapping[str, Path]) -> tuple[str, list[str]]:
    """Refuse tests that are not of the same cases, references and settings.

    Args:
        folders: each test's results, by the run's title.

    Returns:
        A checksum of what they have in common, and the titles of those whose references have no checksums.

    Raises:
        UserError: names those that differ from the newest test.
    """
    found = {title: read_fingerprint(folder) for title, folder in folders.items()}
    newest = max(folders, key=lambda title: (folders[title] / "summary.json").stat().st_mtime_ns)
    unlike = {}
    for title, one in found.items():
        said = [f"{case} is missing" for case in one["lacking"]] or differences(one, found[newest])
        if said:
            unlike[title] = f"{title} ({', '.join(said[:SHOWN])}{', ...' if len(said) > SHOWN else ''})"
    if unlike:
        named = "; ".join(list(unlike.values())[:SHOWN]) + ("; ..." if len(unlike) > SHOWN else "")
        name = next(iter(folders.values())).name
        raise UserError(
            f"these tests are not like the newest, {newest}: {named}. Remove test/{name} of these runs, then give run "
            "and table again."
        )
    alike = {key: found[newest][key] for key in ("images", "references", "settings", "cases", "volumes")}
    checksum = hashlib.sha256(json.dumps(alike, sort_keys=True).encode()).hexdigest()[:16]
    return checksum, [title for title, one in found.items() if not one["references"]]
