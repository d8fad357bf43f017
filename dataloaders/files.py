"""Reading lists and HDF5 cases, with every mistake named."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from sdcl.errors import UserError
from sdcl.runs import LOGGER


@dataclass(frozen=True)
class Sample:
    """One decoded file: image (*S) float32, label (*S) uint8 or None where the file holds none."""

    image: np.ndarray
    label: np.ndarray | None

    @property
    def num_bytes(self) -> int:
        """Memory that the arrays take."""
        return self.image.nbytes + (0 if self.label is None else self.label.nbytes)


def read_list(path: Path) -> list[str]:
    """Read a list of case names, one a line; empty lines and the ends of lines do not matter.

    Raises:
        UserError: the file is missing, empty, or names a case twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"the list {path} does not exist: copy it from the repository's Datasets folder.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the list {path} cannot be read ({error}): write it as UTF-8 text, a case name a line."
        ) from None
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise UserError(f"the list {path} is empty: it needs a case name a line.")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"the list {path} names {name} twice: remove one of the lines.")
        seen.add(name)
    return names


def read_sample(path: Path, *, ndim: int, num_classes: int, needs_label: bool = True) -> Sample:
    """Decode one HDF5 file and check it.

    Args:
        path: the file, with `image` and, if needed, `label`.
        ndim: dimensions that the image must have, 2 or 3.
        num_classes: labels must lie in [0, num_classes).
        needs_label: without it a file may lack `label`; one that is there is ignored.

    Raises:
        UserError: what is wrong with the file.
    """
    try:
        with h5py.File(path, "r") as file:
            missing = [key for key in (["image", "label"] if needs_label else ["image"]) if key not in file]
            if missing:
                found = ", ".join(file) or "nothing"
                raise UserError(f"{path} has no `{missing[0]}` (it holds {found}): convert the case again.")
            image = file["image"][()]
            label = file["label"][()] if needs_label else None
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: restore it, or take its name out of the list.") from None
    except (OSError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a readable HDF5 file ({error}): copy or convert it again.") from None
    return _checked(path, image, label, ndim, num_classes)


def read_spacing(path: Path) -> tuple[float, ...] | None:
    """Return the voxel sides in mm that a file's attribute `spacing` gives, or None where it has none.

    Raises:
        UserError: the attribute is not a positive length for each axis.
    """
    with h5py.File(path, "r") as file:
        if "spacing" not in file.attrs:
            return None
        values = np.ravel(file.attrs["spacing"])
        ndim = file["image"].ndim
    if values.dtype.kind not in "fiu" or len(values) != ndim or not (np.isfinite(values) & (values > 0)).all():
        raise UserError(f"{path}: the attribute `spacing` is {values}, it needs {ndim} lengths in mm: correct it.")
    return tuple(float(value) for value in values)


def _checked(path: Path, image: np.ndarray, label: np.ndarray | None, ndim: int, num_classes: int) -> Sample:
    if not isinstance(image, np.ndarray) or image.ndim != ndim or 0 in image.shape:
        raise UserError(
            f"{path}: `image` has the shape {np.shape(image)}, it needs {ndim} dimensions: convert it again."
        )
    if image.dtype.kind not in "fiu":
        raise UserError(f"{path}: `image` has the type {image.dtype}, it needs numbers: convert the case again.")
    image = np.ascontiguousarray(image, np.float32)
    if not np.isfinite(image).all():
        raise UserError(f"{path}: `image` holds nan or infinite values: convert the case again.")
    if label is None:
        return Sample(image, None)
    if np.shape(label) != image.shape:
        raise UserError(
            f"{path}: `label` {np.shape(label)} and `image` {image.shape} differ in shape: convert it again."
        )
    if label.dtype.kind not in "fiub":
        raise UserError(f"{path}: `label` has the type {label.dtype}, it needs whole numbers: convert the case again.")
    outside = (label < 0) | (label >= num_classes) | (label != np.floor(label) if label.dtype.kind == "f" else False)
    if outside.any():
        raise UserError(
            f"{path}: `label` holds {label[outside].flat[0]}, outside the classes 0 to {num_classes - 1}: "
            "correct the label, or convert the case again."
        )
    return Sample(image, np.ascontiguousarray(label, np.uint8))


class Cache:
    """Files decoded once and kept in memory up to a bound; those beyond it are decoded at each access.

    Args:
        paths: the files.
        what: how to call them in the log, such as "labelled slices".
        bound_gb: memory for the decoded arrays, in GiB.
        ndim: see read_sample.
        num_classes: see read_sample.
        needs_label: see read_sample.
        dtype: of the images kept.

    Raises:
        UserError: the first file that is missing or wrong; every file is checked here, before any training.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        what: str,
        bound_gb: float,
        ndim: int,
        num_classes: int,
        needs_label: bool = True,
        dtype: str = "float32",
    ):
        self._dtype = dtype
        self._paths = list(paths)
        self._how = {"ndim": ndim, "num_classes": num_classes, "needs_label": needs_label}
        self._kept: list[Sample | None] = []
        total = kept = 0
        for path in tqdm(
            self._paths, desc=f"reading {what}", unit="file", leave=False, dynamic_ncols=True, disable=None
        ):
            sample = self._read(path)
            total += sample.num_bytes
            keep = total <= bound_gb * 2**30
            kept += sample.num_bytes if keep else 0
            self._kept.append(sample if keep else None)
        LOGGER.info(
            "%d %s: %.2f of %.2f GiB kept in memory (bound %g)", len(self), what, kept / 2**30, total / 2**30, bound_gb
        )

    def __len__(self) -> int:
        """Count the files."""
        return len(self._paths)

    def __getitem__(self, index: int) -> Sample:
        """Return one decoded file."""
        kept = self._kept[index]
        return kept if kept is not None else self._read(self._paths[index])

    def _read(self, path: Path) -> Sample:
        sample = read_sample(path, **self._how)
        return Sample(sample.image.astype(self._dtype, copy=False), sample.label)


def sample_rng(*numbers: int | str) -> np.random.Generator:
    """Make the generator of one sample from what identifies it, so that no order of reading can change it."""
    words = [int(hashlib.sha256(n.encode()).hexdigest()[:8], 16) if isinstance(n, str) else n for n in numbers]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
