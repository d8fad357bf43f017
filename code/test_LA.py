"""Test SDCL on LA: `python code/test_LA.py`, with the settings below or as flags."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code, whichever is installed

from dataloaders.roots import check_root
from sdcl.runs.config import run_script
from sdcl.runs.folder import find_run

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    """Score a run on LA: each of its predictors, at the selected and at the last checkpoint, in one pass."""

    # --- what to test ---
    root_path: Path = ROOT / "Datasets" / "la"  # the data set's folder, with data/ and data_split/
    models_path: Path = ROOT / "models"  # where the run is: models_path/la_<exp>_<labelnum>_labeled
    exp: str = "SDCL"  # the run's --exp
    labelnum: int = 8  # the run's --labelnum
    run: Path | None = None  # a run's folder, trained on this data set or a compatible one, instead of --exp's
    stage: Literal["self_train", "pre_train"] = "self_train"  # whose checkpoints
    predictors: tuple[str, ...] = ()  # student_a, student_b, mean, teacher; empty: what the method is scored by
    split: Literal["test", "val"] = "test"  # val: the training cases that the run held out with --val_cases
    student_a_weights: Path | None = None  # test these weights (published or yours) instead of the run's; with the next
    student_b_weights: Path | None = None  # the second student's
    spacing: tuple[float, float, float] | None = None  # voxel sides, mm (LA: 0.625 0.625 0.625); None: the files' own
    save_nifti: bool = False  # also write image, label, prediction and probability of each case as NIfTI

    # --- how ---
    protocol: Literal["default", "paper"] = "default"  # paper: an empty mask scores 0 in all four metrics
    patch_size: tuple[int, int, int] = (112, 112, 80)  # window, voxels; a run's own replaces it
    stride: tuple[int, int, int] = (18, 18, 4)  # between windows, voxels
    decision_rule: Literal["argmax", "threshold"] = "threshold"  # foreground is: above 0.5
    window_weighting: Literal["constant", "gaussian"] = "constant"  # gaussian trusts a window's centre more
    tta: bool = False  # average over the eight flips of each window
    largest_component: bool = False  # keep only the largest component (26 neighbours) of each structure
    student_a: Literal["vnet", "resvnet", "vnet_lowres", "resvnet_lowres"] = (
        "vnet"  # network of --student_a_weights; a run's own replaces it
    )
    student_b: Literal["vnet", "resvnet", "vnet_lowres", "resvnet_lowres"] = (
        "resvnet"  # network of --student_b_weights; a run's own replaces it
    )
    window_batch: int = 4  # windows that go through the networks together
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"  # auto: a CUDA GPU if there is one, else the CPU
    gpu: int = 0  # number of the GPU, from 0
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # of the networks


def main(config: Config) -> None:
    """Read the run's settings and the volumes, score, print and write."""
    check_root("la", config.root_path)
    find_run(config, "la")
    from dataloaders.la import DATA_SET  # these take seconds, which a wrong flag need not wait for
    from dataloaders.volumes import VolumeData
    from sdcl.runs.experiment import test

    test(config, VolumeData(DATA_SET, config))


if __name__ == "__main__":
    run_script(main, Config)
