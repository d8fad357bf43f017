"""Reading lists and HDF5 cases, with every mistake named."""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from dataloaders.checks import (
    check_declared,
    check_file,
    check_image,
    check_is_loaded,
    check_label,
    check_name,
    check_varies,
)
from sdcl.runs.errors import UserError

MAX_LIST_BYTES = 2**24


@dataclass(frozen=True)
class Sample:
    """One decoded file.

    Attributes:
        image: (*S), or (channels, *S) of several, float32.
        label: (*S) uint8, or None where the file holds none.
        shape: S.
        texts: the file's attributes `preprocessing` and `orientation`, None for one that it lacks.
        spacing: voxel sides in mm, where they were asked for and are known.
        affine: (4, 4), from indices to mm (RAS+); the same.
    """

    image: np.ndarray
    label: np.ndarray | None
    shape: tuple[int, ...]
    texts: tuple[str | None, ...] = (None, None)
    spacing: tuple[float, ...] | None = None
    affine: np.ndarray | None = None

    @property
    def num_bytes(self) -> int:
        """Memory that the arrays take."""
        return self.image.nbytes + (0 if self.label is None else self.label.nbytes)


def read_list(path: Path) -> list[str]:
    """Read a list of case names, one a line; empty lines, a byte-order mark and the ends of lines do not matter.

    Raises:
        UserError: the file is missing, empty, no text, or names a case twice or by a path.
    """
    check_is_loaded(path)
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise UserError(f"the list {path} has more than {MAX_LIST_BYTES} bytes: write a case name a line.")
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
        check_name(name, path)
        if name in seen:
            raise UserError(f"the list {path} names {name} twice: remove one of the lines.")
        seen.add(name)
    return names


def with_channels(image: np.ndarray, ndim: int) -> np.ndarray:
    """Return an image of ndim dimensions in space, (*S) or (channels, *S), as (channels, *S)."""
    return image[None] if image.ndim == ndim else image


def read_sample(
    path: Path,
    *,
    ndim: int,
    num_classes: int,
    needs_label: bool = True,
    channels: Sequence[str] = (),
    needs_geometry: bool = False,
) -> Sample:
    """Decode one HDF5 file, opened once, and check it.

    Args:
        path: the file, with `image` and, if needed, `label`.
        ndim: dimensions of space, 2 or 3.
        num_classes: labels must lie in [0, num_classes).
        needs_label: without it a file may lack `label`; one that is there is ignored.
        channels: names of the channels that the image must have, (channels, *S); fewer than two: (*S) or (1, *S).
        needs_geometry: without it the sample has no spacing and no affine.

    Raises:
        UserError: what is wrong with the file; a volume, but not a slice, must hold more than one value.
    """
    with _opened(path) as file:
        image = _read_array(path, file, "image")
        label = _read_array(path, file, "label") if needs_label else None
        texts = _texts(file, "preprocessing", "orientation")
        spacing, affine = (_spacing(path, file), _affine(path, file)) if needs_geometry else (None, None)
    if len(channels) < 2:
        is_one_channel = image.ndim == ndim + 1 and len(image) == 1 and (label is None or label.ndim in (0, ndim))
        image = image[0] if is_one_channel else image
    elif image.ndim != ndim + 1 or len(image) != len(channels):
        raise UserError(
            f"{path}: `image` has the shape {image.shape}, it needs {len(channels)} channels ({', '.join(channels)}) "
            f"before {ndim} dimensions: convert it again."
        )
    image = check_image(path, "`image`", image, ndim + (len(channels) > 1))
    shape = image.shape[-ndim:]
    if label is not None:
        label = check_label(path, "`label`", label, shape, num_classes)
    if ndim == 3:  # a scan's margin, or what lies beyond a stripped skull, is a slice of one value that trains as 0s do
        check_varies(path, "`image`", image)
    return Sample(image, label, shape, texts, spacing, affine)


def has_label(path: Path) -> bool:
    """Tell whether a file has a `label`.

    Raises:
        UserError: it cannot be read.
    """
    with _opened(path) as file:
        return "label" in file


def read_spacing(path: Path) -> tuple[float, ...] | None:
    """Return the voxel sides in mm that a file's attribute `spacing` gives, or None where it has none.

    Raises:
        UserError: the attribute is not a positive length for each axis.
    """
    with _opened(path) as file:
        return _spacing(path, file)


def read_shape(path: Path) -> tuple[int, ...]:
    """Return the shape of a file's `image`.

    Raises:
        UserError: the file cannot be read, or has none.
    """
    with _opened(path) as file:
        if not isinstance(file.get("image"), h5py.Dataset):
            raise UserError(f"{path} has no dataset `image`: convert it again.")
        return tuple(file["image"].shape)


def read_affine(path: Path) -> np.ndarray | None:
    """Return the (4, 4) affine, from indices to mm (RAS+), that a converted file's attributes give; None without them.

    Raises:
        UserError: the attributes are no geometry.
    """
    with _opened(path) as file:
        return _affine(path, file)


def read_text_attributes(path: Path, *names: str) -> tuple[str | None, ...]:
    """Return attributes of a file that are texts, None for each that it lacks or that is none."""
    with _opened(path) as file:
        return _texts(file, *names)


def _spacing(path: Path, file: h5py.File) -> tuple[float, ...] | None:
    if "spacing" not in file.attrs:
        return None
    ndim = min(file["image"].ndim, 3)  # (channels, X, Y, Z) have three sides, too
    attribute = file.attrs.get_id("spacing")
    is_small = attribute.dtype.kind in "fiu" and attribute.shape in ((ndim,), (ndim, 1), (1, ndim))
    values = np.ravel(file.attrs["spacing"]) if is_small else attribute.dtype
    if not is_small or not (np.isfinite(values) & (values > 0)).all():
        raise UserError(f"{path}: the attribute `spacing` is {values}, it needs {ndim} lengths in mm: correct it.")
    return tuple(float(value) for value in values)


def _affine(path: Path, file: h5py.File) -> np.ndarray | None:
    spacing = _spacing(path, file)
    parts = [np.ravel(file.attrs[name]) for name in ("origin", "direction") if name in file.attrs]
    if spacing is None or len(spacing) != 3 or len(parts) < 2:
        return None
    if [len(part) for part in parts] != [3, 9] or not all(p.dtype.kind == "f" and np.isfinite(p).all() for p in parts):
        raise UserError(f"{path}: its attributes `origin` and `direction` are no geometry: convert the case again.")
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = parts[1].reshape(3, 3) * spacing, parts[0]
    return affine


def _texts(file: h5py.File, *names: str) -> tuple[str | None, ...]:
    values = [file.attrs.get(name) for name in names] if h5py.h5a.get_num_attrs(file.id) else [None] * len(names)
    values = [value.decode() if isinstance(value, bytes) else value for value in values]
    return tuple(value if isinstance(value, str) else None for value in values)


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file; whatever its reading meets ends in one sentence."""
    check_file(path)
    try:
        with h5py.File(path, "r") as file:
            yield file
    except UserError:
        raise
    except PermissionError:
        raise UserError(f"{path} may not be read: give yourself the permission to.") from None
    except (OSError, RuntimeError, AttributeError, TypeError, ValueError, KeyError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path} is not a readable HDF5 file ({reason}): copy or convert it again.") from None


def _read_array(path: Path, file: h5py.File, key: str) -> np.ndarray:
    """Read one array, after checking that it lies in this file and is as large as it says."""
    links, name = file.id.links, key.encode()  # HDF5's own calls: h5py's take half of a small file's time
    if not links.exists(name):
        found = ", ".join(list(file)[:10]) or "nothing"
        raise UserError(f"{path} has no `{key}` (it holds {found}): convert the case again.")
    if links.get_info(name).type != h5py.h5l.TYPE_HARD:
        raise UserError(f"{path}: `{key}` is a link to somewhere else: store the array itself in the file.")
    dataset = h5py.h5o.open(file.id, name)
    if not isinstance(dataset, h5py.h5d.DatasetID):
        raise TypeError(f"`{key}` is not an array")
    how = dataset.get_create_plist()
    if how.get_external_count() or how.get_layout() == h5py.h5d.VIRTUAL:
        raise UserError(f"{path}: `{key}` is kept in another file: store the array itself in the file.")
    dtype, shape = dataset.dtype, dataset.shape or ()  # None where there is no space at all
    if dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise UserError(f"{path}: `{key}` has the type {dtype}, it needs numbers: convert the case again.")
    check_declared(path, f"`{key}`", shape, dtype.itemsize, dataset.get_storage_size())
    array = np.zeros(shape, dtype)
    dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, array)
    return array


def sample_rng(*numbers: int | str) -> np.random.Generator:
    """Make the generator of one sample from what identifies it, so that no order of reading can change it."""
    words = [_word(n) if isinstance(n, str) else n for n in numbers]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


@functools.cache
def _word(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
