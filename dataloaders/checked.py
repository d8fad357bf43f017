"""What the content of files was found to be, kept in a run's folder: an unchanged file need not be read to start."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py

from sdcl.runs.atomic import write_text
from sdcl.runs.folder import LOGGER

NAME = "checked.json"  # in the run's folder
MAX_BYTES = 2**28
# Where what is refused and what is found is written down: a change there makes every record one of other checks.
SOURCES = ("cache.py", "checked.py", "checks.py", "datasets.py", "files.py", "scans/alignment.py")

Stamp = tuple[int, int]  # a file's size in bytes, and the time of its last change in ns


@dataclass(frozen=True)
class Facts:
    """What the content of one file was found to be.

    Attributes:
        shape: of the image, (*S) or (channels, *S).
        classes: those in the label, background included; None without a label.
        texts: the attributes `preprocessing` and `orientation`, None for one that there is not.
        spacing: voxel sides in mm, where they were asked for and are known.
        affine: rows of (4, 4), from indices to mm (RAS+); the same.
    """

    shape: tuple[int, ...]
    classes: tuple[int, ...] | None
    texts: tuple[str | None, ...]
    spacing: tuple[float, ...] | None = None
    affine: tuple[tuple[float, ...], ...] | None = None


class Checked:
    """Files that passed every check, by what they are read as, path, size and time stamp.

    Args:
        settings: what a verdict depends on beside the file.
        earlier: of an earlier start; see read().
        reason: why there is none though there was a record, or "".
    """

    def __init__(self, settings: Mapping[str, Any], earlier: dict[str, tuple[Stamp, Facts]], reason: str = ""):
        self._settings, self._earlier, self.reason = dict(settings), earlier, reason
        self._now: dict[str, tuple[Stamp, Facts]] = {}

    @classmethod
    def read(cls, folder: Path, settings: Mapping[str, Any]) -> "Checked":
        """Read the record of a run's folder; one that is missing, damaged or of other settings knows no file."""
        settings = json.loads(json.dumps({**settings, "checks": version()}))
        path = folder / NAME
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ValueError("too large")
            total, _, text = path.read_text(encoding="utf-8").partition("\n")
            if total != hashlib.sha256(text.encode()).hexdigest():
                raise ValueError("damaged")
            content = json.loads(text)
            if content["settings"] != settings:
                return cls(settings, {}, "the settings or the checks are other ones than at the last start")
            texts = [tuple(each) for each in content["texts"]]
            return cls(settings, {key: _entry(*fields, texts) for key, *fields in content["files"]})
        except FileNotFoundError:
            return cls(settings, {})
        except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            return cls(settings, {}, f"{path} cannot be used ({error})")

    @property
    def is_new(self) -> bool:
        """Tell whether nothing is known of an earlier start."""
        return not self._earlier

    def find(self, kind: str, path: Path, stamp: Stamp) -> Facts | None:
        """Return what a file was found to be, if it has the size and time stamp that it had then.

        Args:
            kind: what it is read as.
            path: the file.
            stamp: as it is now.
        """
        key = _key(kind, path)
        then, facts = self._earlier.get(key, (None, None))
        if then != stamp:
            return None
        self._now[key] = stamp, facts
        return facts

    def add(self, kind: str, path: Path, stamp: Stamp, facts: Facts) -> None:
        """Note what a file was found to be; its stamp is that from before it was read."""
        self._now[_key(kind, path)] = stamp, facts

    def write(self, folder: Path) -> None:
        """Write the record, if it tells anything new: once everything has passed."""
        if self._now == self._earlier:
            return
        texts: dict[tuple, int] = {}  # they are few, and long
        files = [
            [key, *stamp, *_fields(facts, texts.setdefault(facts.texts, len(texts)))]
            for key, (stamp, facts) in self._now.items()
        ]
        text = json.dumps({"settings": self._settings, "texts": list(texts), "files": files}, separators=(",", ":"))
        try:
            write_text(folder / NAME, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}", any_content=True)
        except OSError as error:
            LOGGER.warning(
                "NOTE: %s cannot be written (%s): the next start reads all files again.", folder / NAME, error
            )


@lru_cache
def version() -> str:
    """Return a checksum of the checks' own text, and of what decodes the files."""
    total = hashlib.sha256(h5py.version.version.encode())
    for name in SOURCES:
        total.update((Path(__file__).parent / name).read_bytes())
    return total.hexdigest()


def _key(kind: str, path: Path) -> str:
    return f"{kind} {path.absolute()}"


def _fields(facts: Facts, texts: int) -> list[Any]:
    geometry = (facts.spacing, facts.affine)
    return [facts.shape, facts.classes, texts, *(geometry if geometry != (None, None) else ())]


def _entry(size: int, changed_at: int, shape: list, classes: list | None, text: int, *rest: Any) -> tuple[Stamp, Facts]:
    """Make a record's line again what it was, or fail."""
    *geometry, texts = rest
    spacing, affine = geometry or (None, None)
    facts = Facts(
        tuple(map(int, shape)),
        None if classes is None else tuple(map(int, classes)),
        texts[text],
        None if spacing is None else tuple(map(float, spacing)),
        None if affine is None else tuple(tuple(map(float, row)) for row in affine),
    )
    return (size, changed_at), facts
