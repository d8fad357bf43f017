"""Segment scans with a trained run: `python code/predict.py --run models/<run> --input scan.nii.gz --output out`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code, whichever is installed

from sdcl.runs.config import processes, run_script
from sdcl.runs.errors import UserError
from sdcl.runs.folder import known_runs, read_config


@dataclass
class Config:
    """Segment raw scans with a trained run: labels on each scan's own grid (NIfTI, of pictures PNG), volumes, a figure.

    Of several channels the files of a case are put together by their names' ends, as import_nifti.py does.

    Training crops LA and Pancreas around the label. A whole scan shows the networks places that they never saw:
    give the structure's surroundings as --roi, let a locator find them (--roi auto; code/locate_train.py trains it), or
    expect false findings far from it.
    """

    run: Path  # a run's folder, models/<data set>_<exp>_<labelnum>_labeled
    input: Path  # a scan (.nii .nii.gz .nrrd .mha .mgz), a DICOM folder, or a folder with these at any depth
    output: Path  # folder that receives <name>_prediction.nii.gz, <name>_figure.png and volumes.csv
    image_pattern: str | None = None  # only these files of a folder: "*/ct.nii.gz"; its star names the scan
    frames: bool = False  # predict each 3D volume (frame) of a 4D file by itself, as <name>_frame01 ...
    series: str | None = None  # of a folder only the DICOM series of this UID, its beginning or description ("T1*")

    # --- which weights ---
    stage: Literal["self_train", "pre_train"] = "self_train"  # whose checkpoints; the best, or the last of no best
    checkpoint: Path | None = None  # this file instead; with --predictor, of networks that it holds
    predictor: str | None = None  # student_a, student_b, mean or teacher; None: the method's own answer

    # --- where and how ---
    roi: tuple[int, int, int, int, int, int] | Literal["auto"] | None = None  # x0 x1 y0 y1 z0 z1: these voxels alone
    locator: Path | None = None  # with --roi auto: the folder of the locator that finds each scan's box
    stride: tuple[int, int, int] | None = None  # between windows, voxels; None: half a window (3D)
    window_weighting: Literal["constant", "gaussian"] = "constant"  # gaussian trusts a window's centre more (3D)
    tta: bool = False  # average over the eight flips of each window (3D)
    skip_air: bool = True  # windows of one value throughout (air, zeros) are computed once a value: same result (3D)
    largest_component: bool = False  # keep only the largest component (26 neighbours) of each structure

    # --- what a scan's header lacks ---
    pixel_spacing_mm: tuple[float, float] | None = None  # between rows, between columns: DICOM without PixelSpacing
    trust_hu: bool = False  # a run on CT: take the scan's values for HU, whatever they look like

    # --- what to write ---
    save_probability: bool = False  # also <name>_probability.nii.gz, of the foreground classes
    dicom_seg: bool = False  # also <name>_prediction.dcm (DICOM SEG), a segment a class; for DICOM series alone
    nnunet_names: bool = False  # call label maps as nnU-Net does: <case>.nii.gz of <case>_0000.nii.gz
    save_figure: bool = True  # <name>_figure.png: the prediction over the scan in three planes

    # --- machine ---
    window_batch: int = 4  # windows that go through the networks together (3D)
    batch_size: int = 16  # slices that go through the networks together (2D)
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"  # auto: a CUDA GPU if there is one, else the CPU
    gpu: int = 0  # number of the GPU, from 0
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # of the networks


def main(config: Config) -> None:
    """Refuse what is not there, then read the run and the scans and segment."""
    if config.input.is_dir() and config.output.resolve().is_relative_to(config.input.resolve()):
        raise UserError(f"--output {config.output} lies in --input, where predictions pass for scans: move it.")
    if not (config.run / "config.json").is_file():
        raise UserError(
            f"--run {config.run} is no run's folder, its config.json does not exist ({known_runs(config.run.parent)}): "
            "give one of these."
        )
    if processes() > 1:
        raise UserError("predict.py runs in one process: start it without torchrun or further tasks of srun.")
    read_config(config.run)
    if not config.input.exists():
        raise UserError(f"--input {config.input} does not exist: check the path.")
    from dataloaders.scans.predicting import predict_scans  # these take seconds, which a wrong flag need not wait for
    from sdcl.runs.experiment import begin
    from sdcl.runs.weights import load_predictor

    predict_scans(config, begin(config), load_predictor)


if __name__ == "__main__":
    run_script(main, Config)
