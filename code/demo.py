"""The demo: make phantoms, then train and test on them, as a user would on the real data."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code, whichever is installed

from sdcl.runs.config import run_script
from sdcl.runs.errors import UserError
from sdcl.runs.matrix import SCRIPTS
from sdcl.runs.written_files import remove_written_folder

ROOT = Path(__file__).resolve().parents[1]
DATA_SETS = ("acdc", "la", "pancreas")
# What a laptop's CPU does in a minute or two each; everything else is the published setting.
SMALL_3D = ["--patch_size", "32", "32", "32", "--labelled_repeat", "20", "--unlabelled_repeat", "20",
            "--pre_iterations", "70", "--self_iterations", "25", "--select", "last"]  # fmt: skip
TRAIN = {
    "acdc": ["--patch_size", "64", "64", "--batch_size", "6", "--pre_iterations", "100", "--self_iterations", "80",
             "--pre_val_from", "50", "--pre_val_every", "50", "--self_val_every", "40"],
    "la": SMALL_3D,
    "pancreas": SMALL_3D,
}  # fmt: skip
LABELNUM = {"acdc": 4, "la": 2, "pancreas": 2}  # of 12 patients, of 6 cases, of 6 cases
TEST = {"acdc": [], "la": ["--stride", "16", "16", "16"], "pancreas": ["--stride", "16", "16", "16"]}


@dataclass
class Config:
    """Make synthetic data sets, train both stages on each, and test."""

    output: Path = ROOT / "demo_output"  # the phantoms and the runs go here; the last demo's runs are replaced
    data_set: Literal["all", "acdc", "la", "pancreas"] = "all"  # which of them
    seed: int = 1337  # of the phantoms and of the training


def call(script: str, *arguments: object) -> None:
    """Run one of the repository's scripts, as on the command line.

    Raises:
        UserError: the script failed; it has said why.
    """
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    print("\n$ python", script, *arguments, flush=True)
    if subprocess.run(command).returncode:
        raise UserError(f"{script} failed, see above.")


def run_one(name: str, config: Config) -> Path:
    """Run one data set's pipeline and return the folder of its test."""
    data, models = config.output / name, config.output / "models"
    train, test = (f"code/{script}" for script in SCRIPTS[name])
    run = models / f"{name}_demo_{LABELNUM[name]}_labeled"
    remove_written_folder(run)
    call("dataloaders/phantom.py", "--dataset", name, "--root_path", data, "--seed", config.seed)
    where = ["--root_path", data, "--models_path", models, "--exp", "demo", "--labelnum", LABELNUM[name]]
    call(train, *where, *TRAIN[name], "--seed", config.seed)
    call(test, *where, *TEST[name])
    return run / "test" / "self_train_test"


def main(config: Config) -> None:
    """Run the pipelines; end with a table and what to look at."""
    begin = time.monotonic()
    chosen = DATA_SETS if config.data_set == "all" else (config.data_set,)
    folders = {name: run_one(name, config) for name in chosen}
    print(f"\nThe demo took {time.monotonic() - begin:.0f} s. Dice on the synthetic test cases, last checkpoints:")
    for name, folder in folders.items():
        rows = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["summary"]
        last = [row for row in rows if "last (" in row["predictor"] and row["structure"] in ("mean", "LA", "pancreas")]
        scores = ", ".join(f"{row['predictor'].split(',')[0]} {row['means']['dice']:.3f}" for row in last)
        print(f"  {name:9s} {scores}")
    print("Look at:")
    for folder in folders.values():
        for file in ("report.html", "cases.png", "metrics.png", "cases.csv"):
            print(f"  {folder / file}")


if __name__ == "__main__":
    run_script(main, Config)
