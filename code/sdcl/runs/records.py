"""The records of a stage: metrics.csv, log.txt and TensorBoard events, without doubled or missing rows after a stop."""

import contextlib
import csv
import io
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import image, scalar

from sdcl.runs.atomic import write_text
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER
from sdcl.runs.written_files import record


class StageRecord:
    """The records of one stage: metrics.csv (a row an iteration), log.txt, TensorBoard events.

    Args:
        folder: the stage's folder, whose name is the stage's.
        columns: of metrics.csv, "iteration" first.
        first_iteration: the iteration that comes next; what an interrupted run wrote about it and later ones is
            dropped, since it comes again.
    """

    def __init__(self, folder: Path, columns: Iterable[str], first_iteration: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.columns = folder, list(columns)
        csv_path, log_path = folder / "metrics.csv", folder / "log.txt"
        kept = io.StringIO()
        writer = csv.DictWriter(kept, self.columns, restval="")
        writer.writeheader()
        writer.writerows(_earlier_rows(csv_path, self.columns, first_iteration))
        write_text(csv_path, kept.getvalue(), any_content=True)  # at once, so that a kill here loses no row
        write_text(log_path, "".join(_earlier_lines(log_path, folder.name, first_iteration)), any_content=True)
        self._csv = open(csv_path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - closed by close()
        self._writer = csv.DictWriter(self._csv, self.columns, restval="")
        self._log = _LogFile(log_path, encoding="utf-8")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        LOGGER.addHandler(self._log)
        LOGGER.setLevel(logging.INFO)
        self._board = _Board(folder, first_iteration)

    def add(self, rows: list[dict[str, float]]) -> None:
        """Append rows to metrics.csv and to TensorBoard; each has "iteration" and some of the columns.

        Raises:
            UserError: the disk refuses them.
        """
        with self._disk():
            for row in rows:
                self._writer.writerow({key: f"{value:.7g}" for key, value in row.items()})
                for key, value in row.items():
                    if key != "iteration":
                        self._board.add(scalar(key, value), int(row["iteration"]))
            self._csv.flush()

    def add_image(self, name: str, picture: np.ndarray, iteration: int) -> None:
        """Show an RGB image (3, H, W) in [0, 1] in TensorBoard."""
        with self._disk():
            self._board.add(image(name, picture), iteration)

    def flush(self) -> None:
        """Bring the rows to the disk; called before each checkpoint, which they must not be behind."""
        with self._disk():
            self._csv.flush()
            os.fsync(self._csv.fileno())
            self._board.flush()

    def is_in(self, folder: Path) -> bool:
        """Tell whether the records still lie in a folder, which may have been moved, removed or replaced."""
        try:
            return os.path.samestat(os.fstat(self._csv.fileno()), os.stat(folder / "metrics.csv"))
        except OSError:
            return False

    def close(self) -> None:
        """Flush and close the files."""
        LOGGER.removeHandler(self._log)
        for file in (self._csv, self._board, self._log):
            with contextlib.suppress(OSError):  # a full disk has been told of
                file.close()

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the records in {self.folder} cannot be written ({error}): free some space and give the same "
                "command again."
            ) from error


class NoRecord:
    """What a process has that is not the first of its run, which alone writes."""

    def add(self, rows: list[dict[str, float]]) -> None:
        """Do nothing."""

    def add_image(self, name: str, picture: np.ndarray, iteration: int) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def is_in(self, folder: Path) -> bool:
        """Return True: the first process looks."""
        return True

    def close(self) -> None:
        """Do nothing."""


class _LogFile(logging.FileHandler):
    """log.txt; a line that the disk refuses stays on the terminal alone."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Do nothing: the rows and checkpoints meet the same disk, and say so."""


class _Board:
    """TensorBoard's event file, written at once: tensorboardX's own writer waits forever for a full disk."""

    def __init__(self, folder: Path, first_iteration: int):
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}")
        self._write(Event(step=first_iteration, session_log=SessionLog(status=SessionLog.START)))  # hides later steps
        self._writer.flush()
        for path in folder.glob(f"events.out.tfevents.*.{os.getpid()}"):
            record(path)

    def add(self, summary: object, iteration: int) -> None:
        """Append a summary of tensorboardX."""
        self._write(Event(step=iteration, summary=summary))

    def flush(self) -> None:
        """Hand what was appended to the system."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)


def _earlier_rows(path: Path, columns: list[str], first_iteration: int) -> list[dict[str, str]]:
    """Return the rows of the iterations before one, in their order; a row that a kill has torn is not among them."""
    if not path.exists():
        return []
    rows: list[dict[str, str]] = []
    latest = 0
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(line.replace("\0", "") for line in file):  # a power cut can leave zeros
            number = row.get("iteration") or ""
            if number.isdecimal() and latest < int(number) < first_iteration:
                latest = int(number)
                rows.append({key: row.get(key) or "" for key in columns})
    return rows


def _earlier_lines(path: Path, stage: str, first_iteration: int) -> list[str]:
    """Return the lines of log.txt, without those about an iteration that comes again."""
    if not path.exists():
        return []
    of_iteration = re.compile(rf"\S+ \S+ {stage} (\d{{1,12}}):")
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        return [
            line for line in file if not (found := of_iteration.match(line)) or int(found.group(1)) < first_iteration
        ]
