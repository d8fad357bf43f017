"""Test SDCL on a data set of your own: `python code/test_own.py --root_path Datasets/mine`; see docs/own_data.md."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code, whichever is installed

from dataloaders.roots import check_root
from sdcl.runs.config import run_script
from sdcl.runs.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    """Score a run on your own data: each of its predictors, at the selected and at the last checkpoint."""

    root_path: Path  # the data set's folder, as dataloaders/import_nifti.py wrote it

    # --- what to test ---
    models_path: Path = ROOT / "models"  # where the run is: models_path/<data set>_<exp>_<labelnum>_labeled
    exp: str = "SDCL"  # the run's --exp
    labelnum: int = 0  # the run's --labelnum; 0: all that have a label
    run: Path | None = None  # a run's folder, trained on this data set or a compatible one, instead of --exp's
    stage: Literal["self_train", "pre_train"] = "self_train"  # whose checkpoints
    predictors: tuple[str, ...] = ()  # student_a, student_b, mean, teacher; empty: what the method is scored by
    split: Literal["val", "test"] = "test"  # which cases; val: those set aside, else those held out (--val_cases)
    student_a_weights: Path | None = None  # test these weights instead of the run's; with the next
    student_b_weights: Path | None = None  # the second student's
    spacing: tuple[float, float, float] | None = None  # voxel sides, mm; None: what the files say (3D)
    save_nifti: bool = False  # also write image, label, prediction and probability of each case as NIfTI

    # --- how ---
    protocol: Literal["default", "paper"] = "default"  # paper: an empty mask scores 0 in all four metrics
    patch_size: tuple[int, ...] = (112, 112, 80)  # window or input; a run's own replaces it
    stride: tuple[int, int, int] | None = None  # between windows, voxels; None: the run's own (3D)
    decision_rule: Literal["argmax", "threshold"] = "argmax"  # foreground is (3D)
    window_weighting: Literal["constant", "gaussian"] = "constant"  # gaussian trusts a window's centre more (3D)
    tta: bool = False  # average over the eight flips of each window (3D)
    largest_component: bool = False  # keep only the largest component (26 neighbours) of each structure
    student_a: Literal["vnet", "resvnet", "unet", "resunet", "vnet_lowres", "resvnet_lowres"] = (
        "vnet"  # network of --student_a_weights; a run's own replaces it
    )
    student_b: Literal["vnet", "resvnet", "unet", "resunet", "vnet_lowres", "resvnet_lowres"] = (
        "resvnet"  # network of --student_b_weights; a run's own replaces it
    )
    window_batch: int = 4  # windows that go through the networks together (3D)
    batch_size: int = 16  # slices that go through the networks together (2D)
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"  # auto: a CUDA GPU if there is one, else the CPU
    gpu: int = 0  # number of the GPU, from 0
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # of the networks


def main(config: Config) -> None:
    """Read the run's settings and the cases, score, print and write."""
    check_root("own", config.root_path)
    from dataloaders.own import count_labelled, read_data_set  # these take seconds, a wrong flag does not
    from dataloaders.slices import SliceData
    from dataloaders.volumes import VolumeData
    from sdcl.runs.experiment import test

    data_set = read_data_set(config.root_path)
    config.labelnum = config.labelnum or count_labelled(config.root_path, data_set)
    is_3d = data_set.preprocessing.layout == "volume"
    if not is_3d and (config.spacing or config.stride or config.tta or config.window_weighting != "constant"):
        raise UserError(
            f"{config.root_path} is a 2D data set: --spacing, --stride, --tta and --window_weighting are for volumes."
        )
    test(config, (VolumeData if is_3d else SliceData)(data_set, config))


if __name__ == "__main__":
    run_script(main, Config)
