"""A list's files: checked at the start, decoded once, kept up to a bound."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from dataloaders.checked import Checked, Facts, Stamp
from dataloaders.checks import check_file
from dataloaders.files import Sample, read_sample
from dataloaders.store import GIB, Kind, Store
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER
from sdcl.scoring.evaluation import Case

UNREAD = Checked({}, {})  # nothing is known of any file


@dataclass(frozen=True)
class Decoding:
    """How the files of a list are decoded, checked and kept.

    Attributes:
        num_classes: labels must lie in [0, num_classes).
        labelled: without it labels are neither needed nor read.
        cache_gb: bound of the memory for decoded arrays, in GiB.
        dtype: of the images kept: float16 takes half the memory, at 3 decimal digits.
        check: what else to refuse of a file, called once with its path and sample; raises UserError.
        channels: see read_sample().
        needs_geometry: see read_sample().
    """

    num_classes: int
    labelled: bool
    cache_gb: float
    dtype: Literal["float32", "float16"] = "float32"
    check: Callable[[Path, Sample], None] | None = None
    channels: tuple[str, ...] = ()
    needs_geometry: bool = False


class Cache:
    """Files decoded once and kept: in memory up to a bound, beyond it on disk after open_file(), else not at all.

    A file that did not change since an earlier start is decoded when it is first asked for, another one at once.

    Args:
        paths: the files.
        what: how to call them in the log, such as "labelled slices".
        ndim: see read_sample.
        decoding: how they are decoded, checked and kept.
        checked: which files an earlier start has checked; those that are read are added.

    Attributes:
        paths: the files.
        facts: what each was found to be.

    Raises:
        UserError: the first file that is missing or wrong; every file is checked here, before any training.
    """

    def __init__(self, paths: Sequence[Path], what: str, ndim: int, decoding: Decoding, checked: Checked = UNREAD):
        self.paths, self.facts = list(paths), []
        self._what, self._ndim, self._decoding = what, ndim, decoding
        self._store = Store(len(self.paths), decoding.cache_gb * GIB)
        kind = f"{ndim}D {'labelled' if decoding.labelled else 'unlabelled'}{' in space' * decoding.needs_geometry}"
        stamps = [_stamp(path) for path in self.paths]
        known = [checked.find(kind, path, stamp) for path, stamp in zip(self.paths, stamps, strict=True)]
        samples = self._read_all([path for path, facts in zip(self.paths, known, strict=True) if facts is None])
        for index, (path, stamp, facts) in enumerate(zip(self.paths, stamps, known, strict=True)):
            sample = None
            if facts is None:
                sample, facts = next(samples)
                checked.add(kind, path, stamp, facts)
            self.facts.append(facts)
            self._store.add(*self._kinds(facts))
            if sample is not None:
                self._store.put(index, _arrays(sample))
        self._tell(known.count(None), checked)

    def __len__(self) -> int:
        """Count the files."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        """Return one decoded file; nobody may change its arrays.

        Raises:
            UserError: it cannot be read any more, or has changed since the start.
        """
        facts, arrays = self.facts[index], self._store.get(index)
        if arrays is None:
            sample = self._read(self.paths[index])
            if sample.image.shape != facts.shape:
                raise UserError(f"{self.paths[index]} has changed since the start: give the same command again.")
            self._store.put(index, _arrays(sample))
            arrays = _arrays(sample)
        label = arrays[1] if len(arrays) > 1 else None
        affine = None if facts.affine is None else np.array(facts.affine)
        return Sample(arrays[0], label, facts.shape[-self._ndim :], facts.texts, facts.spacing, affine)

    @property
    def classes(self) -> set[int]:
        """Return the classes in the labels, background included; none of unlabelled files."""
        return {k for facts in self.facts for k in facts.classes or ()}

    @property
    def waiting_bytes(self) -> int:
        """Return the memory that decoded files will take beside what they take now, once all were asked for."""
        return self._store.held - self._store.filled

    def open_file(self, folder: Path) -> None:
        """Keep files beyond the bound on disk, too; see Store.open_file()."""
        self._store.open_file(folder, self._what)

    def _read_all(self, paths: Sequence[Path]) -> Iterator[tuple[Sample, Facts]]:
        """Yield the samples and facts of files, in their order; several threads would wait for each other in HDF5."""
        shown = tqdm(
            paths, desc=f"reading {self._what}", unit="file", leave=False, dynamic_ncols=True,
            disable=None if paths else True,
        )  # fmt: skip
        yield from map(self._examine, shown)

    def _examine(self, path: Path) -> tuple[Sample, Facts]:
        sample = self._read(path)
        if self._decoding.check is not None:
            self._decoding.check(path, sample)
        has_label, affine = sample.label is not None, sample.affine
        classes = tuple(np.flatnonzero(np.bincount(sample.label.ravel())).tolist()) if has_label else None
        rows = None if affine is None else tuple(map(tuple, affine.tolist()))
        return sample, Facts(sample.image.shape, classes, sample.texts, sample.spacing, rows)

    def _read(self, path: Path) -> Sample:
        how = self._decoding
        sample = read_sample(
            path, ndim=self._ndim, num_classes=how.num_classes, needs_label=how.labelled, channels=how.channels,
            needs_geometry=how.needs_geometry,
        )  # fmt: skip
        return replace(sample, image=sample.image.astype(how.dtype, copy=False))

    def _kinds(self, facts: Facts) -> list[Kind]:
        """Return the dtypes and shapes of a file's arrays."""
        label = [("uint8", facts.shape[-self._ndim :])] if self._decoding.labelled else []
        return [(self._decoding.dtype, facts.shape), *label]

    def _tell(self, count: int, checked: Checked) -> None:
        """Say how many of the files were read, and what is kept of them."""
        how = "each read and checked"
        if not checked.is_new:
            how = f"{count} of them changed since the last start, or are new: read again" if count else (
                "none changed since the last start, by size and time: decoded when first used"
            )  # fmt: skip
        held, total = self._store.held / GIB, (self._store.held + self._store.beyond) / GIB
        LOGGER.info(
            "%d %s: %s; %.3g of %.3g GiB kept in memory (bound %g)", len(self), self._what, how, held, total,
            self._decoding.cache_gb,
        )  # fmt: skip


class Cases(Sequence):
    """Labelled volumes to score, each read from a cache when it is asked for.

    Args:
        names: of the cases.
        cache: of their files.
        places: which of them these are; None: all.
    """

    def __init__(self, names: Sequence[str], cache: Cache, places: Sequence[int] | None = None):
        self._all, self._cache = names, cache
        self._places = range(len(names)) if places is None else places

    @property
    def names(self) -> list[str]:
        """Return the cases' names, for which nothing is read."""
        return [self._all[place] for place in self._places]

    def __len__(self) -> int:
        """Count the cases."""
        return len(self._places)

    def __getitem__(self, index: int | slice) -> "Case | Cases":
        """Return a case, whose arrays are its own, or some of them."""
        if isinstance(index, slice):
            return Cases(self._all, self._cache, self._places[index])
        place = self._places[index]
        sample = self._cache[place]
        image, label = (array if array.flags.writeable else array.copy() for array in (sample.image, sample.label))
        return Case(self._all[place], image, label, sample.spacing, sample.affine)


def _arrays(sample: Sample) -> list[np.ndarray]:
    return [sample.image] if sample.label is None else [sample.image, sample.label]


def _stamp(path: Path) -> Stamp:
    status = check_file(path)
    return status.st_size, status.st_mtime_ns
