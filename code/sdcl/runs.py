"""A run's folder: its configuration, its logs, its scalars."""

import csv
import io
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboardX import SummaryWriter
from tqdm import tqdm

from sdcl.errors import UserError

# Fields that say where and how a run is carried out, not what it computes: they may change when it goes on.
MACHINE_FIELDS = frozenset(
    {"root_path", "models_path", "device", "gpu", "cache_gb", "log_every", "save_every", "window_batch"}
)
PACKAGES = ("torch", "numpy", "scipy", "h5py", "connected-components-3d")
LOGGER = logging.getLogger("sdcl")


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it appears only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with the first one's keys as columns, whole or not at all; nothing for no rows."""
    lines = [",".join(rows[0])] if rows else []
    lines += [",".join(_csv_field(row[key]) for key in rows[0]) for row in rows]
    write_text(path, "".join(f"{line}\n" for line in lines))


def _csv_field(value: Any) -> str:
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\n') else text


def environment(device: torch.device) -> dict[str, Any]:
    """Collect what is needed to run an experiment again: commit, versions, device."""
    root = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    return {
        "commit": commit,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }


def run_folder(models_path: Path, data_set: str, exp: str, labelnum: int) -> Path:
    """Return a run's folder: models_path/<data set>_<exp>_<labelnum>_labeled."""
    return models_path / f"{data_set}_{exp}_{labelnum}_labeled"


def open_run(folder: Path, config: dict[str, Any], device: torch.device) -> None:
    """Create a run's folder with its config.json, or check that the one there has the same configuration.

    Args:
        folder: models/<data set>_<exp>_<labelnum>_labeled.
        config: from config.as_dict.
        device: where the run computes.

    Raises:
        UserError: the folder holds a run with another configuration; the message names the fields that differ.
    """
    path, now = folder / "config.json", environment(device)
    content = {"config": config, "environment": now, "resumed": []}
    if path.exists():
        differing = differing_fields(read_config(folder), config)
        if differing:
            raise UserError(
                f"{folder} holds a run of another configuration ({differing}): "
                "choose another --exp, restore these fields to go on with it, or remove the folder."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
        content.setdefault("resumed", []).append(now)
    write_text(path, json.dumps(content, indent=2) + "\n")


def differing_fields(there: dict[str, Any], now: dict[str, Any]) -> str:
    """Say which fields that matter to a run's result differ between two configurations; "" if none does."""
    names = [k for k in sorted({*there, *now} - MACHINE_FIELDS) if there.get(k) != now.get(k)]
    return ", ".join(f"{k} {there.get(k)} there, {now.get(k)} now" for k in names)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration that a run was started with.

    Raises:
        UserError: there is no readable config.json in the folder.
    """
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["config"]
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: train first, or give the run's --exp, --labelnum and --models_path."
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} cannot be read: restore it from a copy, or remove the folder and train again."
        ) from None


class _TqdmHandler(logging.Handler):
    """Prints log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


def start_logging() -> None:
    """Send log lines to the terminal, once."""
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    if not any(isinstance(handler, _TqdmHandler) for handler in LOGGER.handlers):
        LOGGER.addHandler(_TqdmHandler())


class StopRequest:
    """Turns SIGINT (Ctrl-C) and SIGTERM into a wish to stop after this iteration; a second one stops at once.

    Attributes:
        code: the exit status to end with, 128 + the signal's number; 0 while nobody asked.
    """

    def __init__(self) -> None:
        self.code = 0
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        """Take over the signals; only the main thread can, elsewhere they stay as they are."""
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if self.code:
            sys.exit(self.code)
        self.code = 128 + number
        LOGGER.info("asked to stop: finishing this iteration and saving (again: stop at once)")


class StageRecord:
    """The records of one stage: metrics.csv (a row an iteration), log.txt, TensorBoard events.

    Args:
        folder: the stage's folder.
        columns: of metrics.csv, "iteration" first.
        first_iteration: the iteration that comes next; later rows of an interrupted run are dropped.
    """

    def __init__(self, folder: Path, columns: Iterable[str], first_iteration: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.columns = list(columns)
        self._csv_path = folder / "metrics.csv"
        kept = io.StringIO()
        writer = csv.DictWriter(kept, self.columns, restval="")
        writer.writeheader()
        writer.writerows(self._earlier_rows(first_iteration))
        write_text(self._csv_path, kept.getvalue())  # at once, so that a kill here loses no row
        self._csv = open(self._csv_path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - closed by close()
        self._writer = csv.DictWriter(self._csv, self.columns, restval="")
        self._log = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        LOGGER.addHandler(self._log)
        LOGGER.setLevel(logging.INFO)
        self._board = SummaryWriter(str(folder), purge_step=first_iteration)

    def _earlier_rows(self, first_iteration: int) -> list[dict[str, str]]:
        if not self._csv_path.exists():
            return []
        with open(self._csv_path, encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            return [
                {key: row[key] or "" for key in self.columns if row.get(key) is not None}
                for row in rows
                if (row.get("iteration") or "").isdigit() and int(row["iteration"]) < first_iteration
            ]

    def add(self, rows: list[dict[str, float]]) -> None:
        """Append rows to metrics.csv and to TensorBoard; each has "iteration" and some of the columns."""
        for row in rows:
            self._writer.writerow({key: f"{value:.7g}" for key, value in row.items()})
            for key, value in row.items():
                if key != "iteration":
                    self._board.add_scalar(key, value, int(row["iteration"]))
        self._csv.flush()

    def add_image(self, name: str, image: np.ndarray, iteration: int) -> None:
        """Show an RGB image (3, H, W) in [0, 1] in TensorBoard."""
        self._board.add_image(name, image, iteration)

    def close(self) -> None:
        """Flush and close the files."""
        self._csv.close()
        self._board.close()
        LOGGER.removeHandler(self._log)
        self._log.close()
