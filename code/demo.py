"""The demo: make phantoms, then train and test on them, as a user would on the real data."""

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sdcl.config import run_script
from sdcl.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
# What a laptop's CPU does in a minute or two; everything else is the published setting.
ACDC_TRAIN = [
    "--patch_size", "64", "64", "--batch_size", "6", "--labelnum", "2",
    "--pre_iterations", "150", "--self_iterations", "150", "--pre_val_every", "75", "--self_val_every", "75",
]  # fmt: skip


@dataclass
class Config:
    """Make a synthetic data set, train both stages on it, and test."""

    output: Path = ROOT / "demo_output"  # the phantoms and the runs go here; what the last demo left is replaced
    seed: int = 1337  # of the phantoms and of the training


def call(script: str, *arguments: object) -> None:
    """Run one of the repository's scripts, as on the command line.

    Raises:
        UserError: the script failed; it has said why.
    """
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    print("$ python", script, *arguments, flush=True)
    if subprocess.run(command).returncode:
        raise UserError(f"{script} failed, see above.")


def main(config: Config) -> None:
    """Run the pipeline of each data set and say what to look at."""
    begin = time.monotonic()
    data, models = config.output / "acdc", config.output / "models"
    shutil.rmtree(models, ignore_errors=True)
    call("dataloaders/phantom.py", "--dataset", "acdc", "--root_path", data, "--seed", config.seed)
    where = ["--root_path", data, "--models_path", models, "--exp", "demo", "--labelnum", "2"]
    call("code/ACDC_train.py", *where, *ACDC_TRAIN, "--seed", config.seed)
    call("code/test_ACDC.py", *where)
    run = models / "acdc_demo_2_labeled"
    print(f"\nThe demo took {time.monotonic() - begin:.0f} s. Look at:")
    for path in (
        run / "test" / "self_train_test" / "cases.png",
        run / "test" / "self_train_test" / "cases.csv",
        run / "self_train" / "metrics.csv",
        run / "config.json",
    ):
        print(f"  {path}")


if __name__ == "__main__":
    run_script(main, Config)
