"""A run's folder: its configuration, its logs, its scalars."""

import csv
import json
import logging
import os
import platform
import subprocess
import sys
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
    path = folder / "config.json"
    if path.exists():
        earlier = read_config(folder)
        differing = [k for k in sorted({*earlier, *config} - MACHINE_FIELDS) if earlier.get(k) != config.get(k)]
        if differing:
            what = ", ".join(f"{k} {earlier.get(k)} there, {config.get(k)} now" for k in differing)
            raise UserError(
                f"{folder} holds a run of another configuration ({what}): "
                "choose another --exp, restore these fields to go on with it, or remove the folder."
            )
    write_text(path, json.dumps({"config": config, "environment": environment(device)}, indent=2) + "\n")


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
        rows = self._earlier_rows(first_iteration)
        write_text(self._csv_path, "")
        self._csv = open(self._csv_path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - closed by close()
        self._writer = csv.DictWriter(self._csv, self.columns, restval="")
        self._writer.writeheader()
        self._writer.writerows(rows)
        self._csv.flush()
        self._log = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        LOGGER.addHandler(self._log)
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
