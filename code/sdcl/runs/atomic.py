"""Files that appear only when they are complete, and folders that only one process writes into."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from sdcl.runs.errors import UserError

LOCK = ".lock"  # in the folder; the system releases it when the process ends, however it ends


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a temporary file beside `path`, which takes its place when the block ends without an error.

    It is flushed to the disk before it is renamed, and the renaming before the block's end is reported, so that after
    a kill, a full disk or a power cut there is the old file or the new one, whole.

    Args:
        path: the file; its folder is made where it is missing.

    Yields:
        The temporary file's path, of the same suffix, for the block to write.

    Raises:
        OSError: the disk refuses the file; `path` is as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name("~" + path.name)
    try:
        yield temporary
        flush_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    flush_folder(path.parent)


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


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it appears only when complete."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(text)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder while the block runs.

    Args:
        folder: made where it is missing.

    Raises:
        UserError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
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
