"""Files that appear only when they are complete, and folders that only one process writes into."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from sdcl.runs.errors import UserError
from sdcl.runs.written_files import TEMPORARY, check_replaceable, note_written, record

LOCK_SECONDS = 60.0  # to wait for a table that another process writes
LOCK = ".lock"  # in the folder; the system releases it when the process ends, however it ends


@contextlib.contextmanager
def replacing(path: Path, any_content: bool = False, is_known: bool = False) -> Iterator[Path]:
    """Give the name of a temporary file beside `path`, which takes its place when the block ends without an error.

    It is flushed to the disk before it is renamed, and the renaming before the block's end is reported, so that after
    a kill, a full disk or a power cut there is the old file or the new one, whole. The folder's record then names the
    file as ours (see written_files).

    Args:
        path: the file; its folder is made where it is missing.
        any_content: the file may be replaced later whatever its content, as for a growing log.
        is_known: the caller has read the file that is there and keeps its content, so it need not be ours.

    Yields:
        The temporary file's path, of the same suffix, for the block to write.

    Raises:
        OSError: the disk refuses the file; `path` is as before.
        UserError: the file that is there is the user's.
    """
    if not is_known:
        check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    try:
        yield temporary
        flush_file(temporary)
        record(path, None if any_content else temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    flush_folder(path.parent)
    note_written(path)


def temporary_of(path: Path) -> Path:
    """Return the name that a file has while it is being written."""
    return path.with_name(TEMPORARY + path.name)


def flush_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, where the system can (Windows cannot)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network file systems do not know it
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str, any_content: bool = False, is_known: bool = False) -> None:
    """Write a text file so that it appears only when complete; see replacing() for the arguments."""
    with (
        replacing(path, any_content, is_known) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        file.write(text)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file while the block runs, and wait for another process that holds it.

    Raises:
        UserError: another process has held it for a minute, or the disk cannot lock files.
    """
    lock = FileLock(path, timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another process has held {path} for {LOCK_SECONDS:g} s: stop it and try again.") from None
    except NotImplementedError:
        raise UserError(f"the disk of {path.parent} cannot lock files: choose a folder on another disk.") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder while the block runs.

    Args:
        folder: made where it is missing.

    Raises:
        UserError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / LOCK).exists() and (folder / LOCK).stat().st_size:
        raise UserError(f"{folder / LOCK} is no lock of this project, since it has content: move it away.")
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another process writes into {folder}: wait for its end, stop it, or choose another --exp."
        ) from None
    except NotImplementedError:
        raise UserError(
            f"the disk of {folder} cannot lock files, so that two processes could spoil one run: "
            "choose a --models_path on another disk."
        ) from None
    try:
        yield
    finally:
        lock.release()
