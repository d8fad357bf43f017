"""Decoded arrays, each at a place of its own: in memory up to a bound, beyond it in a file that ends with the run."""

import contextlib
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

CHUNK_BYTES = 2**26  # memory is taken in pieces of this size, or of one entry; untouched pages of it take none
ALIGNMENT = 64  # of an array's first byte
SPARE_BYTES = 2**31  # of a disk, left to checkpoints
PREFIX = "~decoded_"  # of the file, on disks that cannot have one without a name
GIB = 2**30
THERE = 1

Kind = tuple[str, tuple[int, ...]]  # an array's dtype and shape


class Store:
    """Places for so many entries of a few arrays each, filled in any order and shared with forked processes.

    Two processes that fill an entry at the same time write the same bytes: an entry follows from its file.

    Args:
        count: of the entries.
        bound_bytes: of memory. Entries are placed in their order, up to the first that does not fit.

    Attributes:
        held: bytes of the entries placed in memory.
        beyond: bytes of the others.
        filled: bytes that this process has put into memory.
    """

    def __init__(self, count: int, bound_bytes: float):
        self._count, self._bound = count, bound_bytes
        self._kinds: list[tuple[Kind, ...]] = []
        self._places: list[tuple[mmap.mmap | None, int]] = []  # of each entry: its piece of memory, and where in it
        self._piece: mmap.mmap | None = None
        self._end = 0  # of what is placed in the last piece
        self._flags = mmap.mmap(-1, count + 1)  # of each entry whether it is there; the last: the disk is full
        self._file = self._mapped = None
        self.held = self.beyond = self.filled = 0

    def __reduce__(self) -> tuple:
        """Give a process that is not forked the places without what is in them; it has no file."""
        return _again, (self._count, self._bound, self._kinds)

    def add(self, *kinds: Kind) -> None:
        """Place the next entry.

        Args:
            kinds: dtype and shape of each of its arrays.

        Raises:
            UserError: the system gives no memory.
        """
        num_bytes = sum(map(_padded_bytes, kinds))
        self._kinds.append(kinds)
        if self.beyond or self.held + num_bytes > self._bound:
            self._places.append((None, self.beyond))
            self.beyond += num_bytes
            return
        if self._piece is None or self._end + num_bytes > len(self._piece):
            try:
                self._piece, self._end = mmap.mmap(-1, max(CHUNK_BYTES, num_bytes)), 0
            except (OSError, MemoryError) as error:
                raise UserError(f"there is no memory for decoded files ({error}): lower --cache_gb.") from None
        self._places.append((self._piece, self._end))
        self._end += num_bytes
        self.held += num_bytes

    def get(self, index: int) -> list[np.ndarray] | None:
        """Return an entry's arrays, which nobody can change; None while they are not there."""
        if self._flags[index] != THERE:
            return None
        piece, offset = self._places[index]
        source, arrays = (self._mapped if piece is None else piece), []
        for dtype, shape in self._kinds[index]:
            array = np.frombuffer(source, dtype, math.prod(shape), offset).reshape(shape)
            array.flags.writeable = False
            arrays.append(array)
            offset += _padded_bytes((dtype, shape))
        return arrays

    def put(self, index: int, arrays: Sequence[np.ndarray]) -> bool:
        """Keep an entry's arrays, of the kinds that it was added with; tell whether there is a place for them."""
        piece, offset = self._places[index]
        if piece is None and (self._file is None or self._flags[self._count]):
            return False
        for array, kind in zip(arrays, self._kinds[index], strict=True):
            data = memoryview(np.ascontiguousarray(array, kind[0])).cast("B")
            if piece is not None:
                piece[offset : offset + len(data)] = data
                self.filled += _padded_bytes(kind)
            elif not self._write(data, offset):
                return False
            offset += _padded_bytes(kind)
        self._flags[index] = THERE
        return True

    def open_file(self, folder: Path, what: str) -> None:
        """Give the entries beyond the bound a file, and say how much disk it takes, or why there is none.

        The file has no name, so that the system removes it when the run ends, however it ends.

        Args:
            folder: on the disk to use.
            what: the entries' name in the log.
        """
        if not self.beyond:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)  # another machine's process may have none
            free = shutil.disk_usage(folder).free
            if not hasattr(os, "pwrite"):
                raise OSError("this system has no pwrite")
            if free < self.beyond + SPARE_BYTES:
                raise OSError(f"{free / GIB:.2f} GiB are free, {SPARE_BYTES / GIB:g} of which are left to checkpoints")
            self._file = tempfile.TemporaryFile(prefix=PREFIX, dir=folder, buffering=0)  # noqa: SIM115 - kept open
            self._file.truncate(self.beyond)
            self._mapped = mmap.mmap(self._file.fileno(), self.beyond, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            self._file = None
            LOGGER.warning(
                "NOTE: %.2f GiB of %s beyond --cache_gb cannot wait on the disk of %s (%s): their files are decoded "
                "at each reading.", self.beyond / GIB, what, folder, error,
            )  # fmt: skip
            return
        LOGGER.info(
            "%s beyond --cache_gb are decoded once, into a file on the disk of %s that takes up to %.2f GiB until the "
            "run ends", what, folder, self.beyond / GIB,
        )  # fmt: skip

    def _write(self, data: memoryview, offset: int) -> bool:
        """Write to the file: a full disk is an error here, and not the signal that ends who writes into a map."""
        try:
            while data:
                written = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            if not self._flags[self._count]:
                self._flags[self._count] = 1
                LOGGER.warning("NOTE: no more decoded files are kept on disk (%s): they are decoded again.", error)
            return False
        return True


def remove_files(folder: Path) -> None:
    """Remove what a kill at the very opening of a file has left in a run's folder, where files cannot lack a name."""
    for path in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            path.unlink()


def _padded_bytes(kind: Kind) -> int:
    """Return the bytes of an array, up to where the next one may begin."""
    return -(-math.prod(kind[1]) * np.dtype(kind[0]).itemsize // ALIGNMENT) * ALIGNMENT


def _again(count: int, bound_bytes: float, kinds: list[tuple[Kind, ...]]) -> Store:
    store = Store(count, bound_bytes)
    for entry in kinds:
        store.add(*entry)
    return store
