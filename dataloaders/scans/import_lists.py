"""Which imported cases train, validate and test: drawn once, kept when more come."""

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from dataloaders.datasets import SLICE, find_file
from dataloaders.files import read_list, sample_rng
from dataloaders.scans.convert import few
from dataloaders.scans.joining import Cases
from sdcl.runs.atomic import write_text
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER
from sdcl.runs.written_files import check_replaceable, remove_written

SUFFIXES = {"volume": ".txt", "slices": ".list"}
NO_CASES = Cases({})
EMPTY: Mapping[str, str] = {}
LISTS = ("train", "train_lab", "train_unlab", "train_slices", "val", "test")


@dataclass(frozen=True)
class Lists:
    """Names of the cases: labelled and unlabelled ones for training, and those that training must not see."""

    labelled: list[str]
    unlabelled: list[str]
    val: list[str]
    test: list[str]

    @classmethod
    def read(cls, root: Path) -> "Lists | None":
        """Read the lists of an earlier import, or None without any.

        Raises:
            UserError: a list is broken.
        """
        folder = root / "data_split"
        suffix = next((s for s in SUFFIXES.values() if (folder / f"train{s}").exists()), None)
        if suffix is None:
            return None
        names = {key: _names(folder / f"{key}{suffix}") for key in ("train", "train_lab", "val", "test")}
        labelled = {name.rsplit(SLICE, 1)[0] for name in names["train_lab"]}
        train = names["train"]
        return cls(
            [n for n in train if n in labelled], [n for n in train if n not in labelled], names["val"], names["test"]
        )


def _names(path: Path) -> list[str]:
    return read_list(path) if path.exists() and path.read_text(encoding="utf-8-sig").strip() else []


def _test_list(config: Any) -> list[str]:
    return [unicodedata.normalize("NFC", name) for name in read_list(config.test_list)]  # as cases are called


def settings_of(config: Any) -> dict[str, Any]:
    """Return what chose the lists, as dataset.json keeps it."""
    return {
        "test_fraction": config.test_fraction, "val_fraction": config.val_fraction, "seed": config.seed,
        "test_list": _test_list(config) if config.test_list else None,
    }  # fmt: skip


def draw(
    labelled: Sequence[str],
    unlabelled: Sequence[str],
    config: Any,
    cases: Cases = NO_CASES,
    healthy: Collection[str] = (),
) -> Lists:
    """Divide the labelled cases into training, validation and test, the cases of a patient together.

    Args:
        labelled: names of the cases that have a label.
        unlabelled: the others, which train; those of a patient who is held out are left out, and told.
        config: the header: fractions, seed, a list of test cases.
        cases: whose they are, and on which side, where a table says so.
        healthy: labelled cases without foreground; the fractions hold for patients with foreground and for those
            without any.

    Raises:
        UserError: fewer than two are left for training, or the test list names others.
    """
    if not (0 <= config.test_fraction < 1 and 0 <= config.val_fraction < 1):
        raise UserError(
            f"--test_fraction {config.test_fraction} and --val_fraction {config.val_fraction} must lie in [0, 1)."
        )
    patient_of = {name: cases.patients.get(name, name) for name in (*labelled, *unlabelled)}
    if cases.splits:
        sides = {side: sorted(n for n in labelled if cases.splits[n] == side) for side in ("train", "val", "test")}
        return _checked(Lists(sides["train"], sorted(unlabelled), sides["val"], sides["test"]), patient_of, config)
    order = sample_rng(config.seed, "split").permutation(sorted({patient_of[name] for name in labelled})).tolist()
    with_foreground = {patient_of[name] for name in labelled if name not in healthy}
    groups = [[p for p in order if p in with_foreground], [p for p in order if p not in with_foreground]]
    held = [patient for group in groups for patient in group[: round(config.test_fraction * len(group))]]
    test = _test_list(config) if config.test_list else [n for n in sorted(labelled) if patient_of[n] in held]
    unknown = next((name for name in test if name not in labelled), None)
    if unknown:
        raise UserError(
            f"--test_list {config.test_list} names {unknown}, which has no scan or no label: correct the list."
        )
    tested = {patient_of[name] for name in test}
    rest = [patient for patient in order if patient not in tested]
    validated = []
    for group in groups:
        left_of_group = [patient for patient in group if patient in rest]
        validated += left_of_group[: round(config.val_fraction * len(group))]
    val = [name for name in sorted(labelled) if patient_of[name] in validated]
    train = [n for n in sorted(labelled) if patient_of[n] in rest and patient_of[n] not in validated]
    if left := sorted(n for n in labelled if patient_of[n] in tested and n not in test):
        LOGGER.info("left out of every list, since other cases of their patients are for the test: %s", few(left))
    return _checked(Lists(train, sorted(unlabelled), val, sorted(test)), patient_of, config)


def tell_healthy_splits(lists: Lists, healthy: Collection[str]) -> None:
    """Warn where the cases that are to score a run have no foreground at all."""
    for what, names in (("validation", lists.val), ("test", lists.test)):
        if names and set(names) <= set(healthy):
            LOGGER.warning(
                "NOTE: none of the %d %s cases has foreground, so their Dice is meaningless: give another --seed with "
                "--resplit, or hold out more cases.", len(names), what,
            )  # fmt: skip


def _checked(lists: Lists, patient_of: Mapping[str, str], config: Any) -> Lists:
    """Refuse a division that leaves too little, and leave out unlabelled cases of patients who are held out."""
    train, val, test = lists.labelled, lists.val, lists.test
    if not test:
        raise UserError(
            f"no case of the {len(train) + len(val)} labelled ones is left for the test: raise --test_fraction"
            f"{'' if getattr(config, 'described_by', None) else ', or give --test_list'}."
        )
    if len(train) < 2:
        raise UserError(
            f"{len(train)} labelled cases are left for training, {len(val)} for validation, {len(test)} for the test: "
            "at least two must be left; lower --test_fraction or --val_fraction, or label more."
        )
    held = {patient_of[name] for name in (*val, *test)}
    kept = [name for name in lists.unlabelled if patient_of[name] not in held]
    if left := [name for name in lists.unlabelled if name not in kept]:
        LOGGER.info("left out of training, since their patients are held out: %s", few(left))
    return Lists(train, kept, val, test)


def keep(
    earlier: Lists, drawn: Lists, config: Any, settings: Mapping[str, Any] | None, patients: Mapping[str, str] = EMPTY
) -> Lists:
    """Keep an earlier import's division, add new cases to training, and say what stays, came, changed and went.

    Args:
        earlier: the lists that are there.
        drawn: as they would be drawn now.
        config: the header.
        settings: what the earlier lists were drawn with, or None where that is not known.
        patients: whose a case is, where a table says so: new cases of a patient who is held out do not train.

    Raises:
        UserError: --test_list contradicts them, or too few cases are left.
    """
    labelled = {*drawn.labelled, *drawn.val, *drawn.test}
    cases = labelled | set(drawn.unlabelled)
    if config.test_list and set(drawn.test) != set(earlier.test) & labelled:
        other = sorted(set(drawn.test) ^ set(earlier.test))[0]
        raise UserError(
            f"--test_list {config.test_list} and the test cases of the earlier import differ in {other}: give "
            "--resplit to divide the cases anew, or leave --test_list away."
        )
    held = {*earlier.val, *earlier.test}
    before = [*earlier.labelled, *earlier.unlabelled]
    train = [name for name in before if name in cases]
    whose = {patients.get(name, name) for name in held}
    new = sorted(cases - set(before) - held)
    if left := [name for name in new if patients.get(name, name) in whose]:
        LOGGER.info("new, left out of every list, since their patients are held out: %s", few(left))
        new = [name for name in new if name not in left]
    kept = Lists(
        [name for name in (*train, *new) if name in labelled],
        [name for name in (*train, *new) if name not in labelled],
        [name for name in earlier.val if name in labelled],
        [name for name in earlier.test if name in labelled],
    )
    _tell(earlier, kept, cases, new)
    if settings is None or settings != settings_of(config):
        LOGGER.info(
            "the lists stay as they were divided, not as --test_fraction %g, --val_fraction %g and --seed %d would do "
            "it now: --resplit divides anew", config.test_fraction, config.val_fraction, config.seed,
        )  # fmt: skip
    if not kept.test or len(kept.labelled) < 2:
        raise UserError(
            f"of the earlier lists {len(kept.test)} test cases and {len(kept.labelled)} labelled training cases are "
            "left, and at least one and two are needed: give --resplit, or put the files back."
        )
    return kept


def _tell(earlier: Lists, kept: Lists, cases: set[str], new: Sequence[str]) -> None:
    """Say what differs from the earlier lists."""
    before = {*earlier.labelled, *earlier.unlabelled, *earlier.val, *earlier.test}
    held = sorted({*earlier.val, *earlier.test} - {*kept.val, *kept.test})
    lines = {
        "the test and validation cases stay those of the earlier import": [*kept.test, *kept.val],
        "new, for training (--resplit divides anew)": new,
        "labelled since": [name for name in kept.labelled if name in earlier.unlabelled],
        "no longer labelled, now an unlabelled training case": [n for n in kept.unlabelled if n in earlier.labelled],
        "no longer labelled, left out of every list, since it was held out from training": [
            name for name in held if name in cases
        ],
        "no longer among the scans, left out of every list (the converted file stays)": sorted(before - cases),
    }
    for what, names in lines.items():
        if names:
            LOGGER.info("%s: %s", what, few(names))


def write_lists(root: Path, layout: str, lists: Lists) -> None:
    """Write the lists, labelled cases first; in 2D the training cases' slices."""
    folder, suffix = root / "data_split", SUFFIXES[layout]
    names = {"train": [*lists.labelled, *lists.unlabelled], "test": lists.test}
    parts = {"train_lab": lists.labelled, "train_unlab": lists.unlabelled}
    if layout == "slices":
        parts = {key: [s for name in part for s in slices_of(root, name)] for key, part in parts.items()}
        parts["train_slices"] = [*parts["train_lab"], *parts["train_unlab"]]
    names |= parts | ({"val": lists.val} if lists.val else {})
    for old in (folder / f"{key}{s}" for key in LISTS for s in SUFFIXES.values()):
        if old.suffix != suffix or old.stem not in names:
            remove_written(old)  # left by an import of another layout or with validation
    for key, part in names.items():
        write_text(folder / f"{key}{suffix}", "".join(f"{name}\n" for name in part), any_content=True)


def check_lists_replaceable(root: Path) -> None:
    """Check that no list of the user's lies where the import writes its lists.

    Raises:
        UserError: there is one.
    """
    check_replaceable(*(root / "data_split" / f"{key}{suffix}" for key in LISTS for suffix in SUFFIXES.values()))


def slices_of(root: Path, name: str) -> list[str]:
    """Return the names of a case's slices, in order: as many as its volume has."""
    with h5py.File(find_file(root, name), "r") as file:
        count = file["image"].shape[-3]
    return [f"{name}{SLICE}{k}" for k in range(1, count + 1)]
