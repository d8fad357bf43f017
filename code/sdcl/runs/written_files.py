"""A record of the files that this project wrote into a folder. Only these files are ever replaced or removed.

Each folder that receives files has a hidden record, `.sdcl_written`: one JSON line per written file, with its name and
the SHA-256 of its content. A file that the record does not name, or whose content has changed since, is the user's.
Files that a run itself goes on with (checkpoints, logs, lists) are recorded by their name only.
"""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdcl.runs.errors import UserError

RECORD = ".sdcl_written"
TEMPORARY = "~sdcl_"  # begins the names of files that are not complete yet, or that a kill has left so
ANY_CONTENT = "*"  # recorded instead of a hash for files that are ours whatever they hold now
PHANTOM_MARKER = "PHANTOM.txt"
PHANTOM_TEXT = "Synthetic data, written by dataloaders/phantom.py"
LOCATOR = "locator.json"
# What a version without records wrote into the folders that are its own.
OUTPUTS = {
    "config.json", "checked.json", "pre_train", "self_train", "test",  # a run
    "dataset.json", "data", "data_split", "by_index.png",  # a data set
    LOCATOR, "weights.pth", "held_out.csv",  # a locator
    "table.csv", "table.json", "table.md", "table.tex", "cases.csv", "report.html", "training.png", "logs", "slurm",
}  # fmt: skip
MAX_JSON_BYTES = 2**24
MAX_LEVELS = 4  # how far above a file the folder lies that an earlier version wrote


@dataclass
class _ReadRecord:
    """A folder's record as it was last read: its lines, and the hashes by file name."""

    content: bytes = b""
    entries: dict[str, set[str]] = field(default_factory=dict)


_records_read: dict[str, _ReadRecord] = {}
_lock = threading.Lock()
_written_here: dict[str, tuple[int, int]] = {}  # size and time of change of each file that this process wrote


def check_replaceable(*paths: Path) -> None:
    """Check that nothing of the user's lies where files are about to be written.

    Args:
        paths: the files to write; they may be missing.

    Raises:
        UserError: one of them exists and this project did not write it, or it has been changed since.
    """
    for path in paths:
        if not os.path.lexists(path) or path.name.startswith(TEMPORARY) or _is_written_by_this_process(path):
            continue
        known = _recorded(path)
        if known is None:
            raise UserError(
                f"{path} exists, and no record says that this project wrote it: move it away, or choose another output."
            )
        if ANY_CONTENT not in known and (path.is_dir() or _sha256(path) not in known):
            raise UserError(
                f"{path} has been changed since this project wrote it: move it away, or choose another output."
            )
        if not path.is_dir():
            note_written(path)


def is_recorded(path: Path) -> bool:
    """Tell whether the record of a file's folder names it."""
    return path.name in _entries(path.parent)


def is_own_file(path: Path) -> bool:
    """Tell whether a file is one that a run or an import goes on with, such as a checkpoint or a list."""
    return ANY_CONTENT in (_recorded(path) or ())


def record(path: Path, content: Path | None = None) -> None:
    """Note that a file is about to appear, so that a later run may replace it.

    Args:
        path: the file's final place.
        content: a complete file of the same content; None records the name for any content.
    """
    if content is None and ANY_CONTENT in (_entries(path.parent).get(path.name) or ()):
        return
    _append(path.parent, [path.name], ANY_CONTENT if content is None else _sha256(content))


def _append(folder: Path, names: Sequence[str], content: str = ANY_CONTENT) -> None:
    """Append lines to a folder's record in one write, so that processes on one machine do not mix their lines."""
    lines = "".join(json.dumps([name, content]) + "\n" for name in names)
    descriptor = os.open(folder / RECORD, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size:
            os.lseek(descriptor, size - 1, os.SEEK_SET)
            lines = lines if os.read(descriptor, 1) == b"\n" else f"\n{lines}"  # behind a line that a kill has torn
        os.write(descriptor, lines.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def note_written(path: Path) -> None:
    """Remember within this process that a file in its final place is ours, so that it need not be read again."""
    status = os.lstat(path)
    _written_here[os.path.abspath(path)] = (status.st_size, status.st_mtime_ns)


def remove_written(path: Path) -> None:
    """Remove a file that this project wrote; do nothing where there is none.

    Raises:
        UserError: the file is the user's.
    """
    check_replaceable(path)
    path.unlink(missing_ok=True)


def remove_written_folder(folder: Path) -> None:
    """Remove a folder with the files in it that this project wrote.

    Raises:
        UserError: a file in it is the user's; nothing has been removed then.
    """
    if not folder.is_dir():
        return
    ours = (RECORD, ".lock")
    files = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    check_replaceable(*(path for path in files if path.name not in ours))
    for path in sorted(files, key=lambda path: path.name == RECORD):  # after a kill, the records know what is left
        path.unlink(missing_ok=True)
    for parent, folders, _ in os.walk(folder, topdown=False):
        for name in folders:
            with contextlib.suppress(OSError):
                Path(parent, name).rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _is_written_by_this_process(path: Path) -> bool:
    status = os.lstat(path)
    return _written_here.get(os.path.abspath(path)) == (status.st_size, status.st_mtime_ns)


def _recorded(path: Path) -> set[str] | None:
    """Return the hashes that a file may have; None for a file that no record names."""
    known = _entries(path.parent).get(path.name)
    if known is not None:
        return known
    root = _folder_of_an_earlier_version(path)
    if root is not None:
        _record_all(root)
        return _entries(path.parent).get(path.name)
    return {ANY_CONTENT} if _is_converted_case(path) or _is_table_of_names(path) else None


def _entries(folder: Path) -> dict[str, set[str]]:
    """Read a folder's record: the hashes by file name. Torn lines are skipped; lines that were parsed stay known."""
    path = folder / RECORD
    try:
        content = path.read_bytes()
    except OSError:
        return {}
    complete = content[: content.rfind(b"\n") + 1]
    with _lock:
        known = _records_read.setdefault(os.path.abspath(path), _ReadRecord())
        if not complete.startswith(known.content):  # another record of the same place
            known = _records_read[os.path.abspath(path)] = _ReadRecord()
        for line in complete[len(known.content) :].splitlines():
            with contextlib.suppress(ValueError):  # UnicodeDecodeError is one
                name, digest = json.loads(line)
                known.entries.setdefault(str(name), set()).add(str(digest))
        known.content = complete
        return known.entries


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            total.update(block)
    return total.hexdigest()


def _folder_of_an_earlier_version(path: Path) -> Path | None:
    """Return the run, data set or comparison that a file lies in, if a version without records wrote it."""
    for folder in list(path.absolute().parents)[:MAX_LEVELS]:
        if _is_ours(folder):
            return None if (folder / RECORD).exists() else folder
    return None


def _is_ours(folder: Path) -> bool:
    """Tell whether a folder is a run, an imported or synthetic data set, a locator, or an experiment's comparison."""
    run = _read_json(folder / "config.json").get("config")
    if isinstance(run, dict) and {"student_a", "patch_size", "labelnum"} <= set(run):
        return True
    if is_our_description(_read_json(folder / "dataset.json")) or "weights_sha256" in _read_json(folder / LOCATOR):
        return True
    with contextlib.suppress(OSError, ValueError):
        if (folder / PHANTOM_MARKER).read_text(encoding="utf-8").startswith(PHANTOM_TEXT):
            return True
    with contextlib.suppress(OSError, ValueError):
        with open(folder / "table.csv", encoding="utf-8") as file:
            return {"method", "labelnum", "predictor", "metric"} <= set(file.readline(1000).strip().split(","))
    return False


def _read_json(path: Path) -> dict:
    """Read a small JSON file that holds an object; anything else counts as an empty one."""
    with contextlib.suppress(OSError, ValueError):
        if path.stat().st_size <= MAX_JSON_BYTES:
            content = json.loads(path.read_text(encoding="utf-8"))
            return content if isinstance(content, dict) else {}
    return {}


def is_our_description(content: object) -> bool:
    """Tell whether the content of a dataset.json is what an import here writes, not nnU-Net's or another program's."""
    ours = {"class_names", "preprocessing"}
    return isinstance(content, dict) and ours <= set(content) and isinstance(content["preprocessing"], dict)


def _record_all(root: Path) -> None:
    """Record the files that a version without records wrote into a run's, data set's or other folder of its own."""
    is_phantom = (root / PHANTOM_MARKER).exists()  # a folder of synthetic data only
    names_of: dict[Path, list[str]] = {}
    for parent, _, names in os.walk(root, topdown=False):  # the root last: its record says that all are there
        for name in names:
            top = Path(parent, name).relative_to(root).parts[0]
            if (top in OUTPUTS or is_phantom) and name != RECORD:
                names_of.setdefault(Path(parent), []).append(name)
    for folder, names in names_of.items():
        _append(folder, names)


def _is_table_of_names(path: Path) -> bool:
    """Tell whether a file is the cases.csv that preprocess_pancreas.py wrote before there were records."""
    if path.name != "cases.csv":
        return False
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        return file.readline(100).strip() == "case,image,label"
    return False


def _is_converted_case(path: Path) -> bool:
    """Tell whether a file is a case that a preprocessing script converted before there were records."""
    if path.suffix != ".h5":
        return False
    import h5py  # most writers need not wait for it

    try:
        with h5py.File(path, "r") as file:
            return {"rule", "preprocessing"} <= set(file.attrs)
    except OSError:
        return False
