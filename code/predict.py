"""Segment scans with a trained run: `python code/predict.py --run models/<run> --input scan.nii.gz --output out`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dataloaders.prediction import Run, check_roi, inference_of, nifti_like, save_nifti_file, segment
from dataloaders.scans import Scan, find_scans, name_of, read_scan
from dataloaders.volumes import check_windows
from sdcl.config import run_script
from sdcl.errors import UserError
from sdcl.experiment import begin
from sdcl.report import save_scan_figure
from sdcl.runs import LOGGER, write_csv


@dataclass
class Config:
    """Segment raw scans with a trained run: labels as NIfTI on each scan's own grid, volumes in ml, a figure.

    Training crops LA and Pancreas around the label. A whole scan shows the networks places that they never saw:
    give the structure's surroundings as --roi, or expect false findings far from it.
    """

    run: Path  # a run's folder, models/<data set>_<exp>_<labelnum>_labeled
    input: Path  # a scan (.nii .nii.gz .nrrd .mha), a DICOM folder, or a folder of these
    output: Path  # folder that receives <name>_prediction.nii.gz, <name>.png and volumes.csv

    # --- which weights ---
    stage: Literal["self_train", "pre_train"] = "self_train"  # whose checkpoints; the best, or the last of no best
    predictor: Literal["mean", "student_a", "student_b"] = "mean"  # both students, or one

    # --- where and how ---
    roi: tuple[int, int, int, int, int, int] | None = None  # x0 x1 y0 y1 z0 z1: only these voxels of the scan
    stride: tuple[int, int, int] | None = None  # between windows, voxels; None: half a window (3D)
    window_weighting: Literal["constant", "gaussian"] = "constant"  # gaussian trusts a window's centre more (3D)
    tta: bool = False  # average over the eight flips of each window (3D)
    largest_component: bool = False  # keep only the largest component (26 neighbours) of each structure

    # --- what to write ---
    save_probability: bool = False  # also <name>_probability.nii.gz, of the foreground classes
    save_figure: bool = True  # <name>.png: the prediction over the scan in three planes

    # --- machine ---
    window_batch: int = 4  # windows that go through the networks together (3D)
    batch_size: int = 16  # slices that go through the networks together (2D)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU if there is one
    gpu: int = 0  # number of the GPU, from 0
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # of the networks


def write_results(config: Config, run: Run, name: str, scan: Scan, probabilities: np.ndarray) -> list[dict]:
    """Write one scan's label map, and what else is asked for; return its structures' volumes."""
    label = run.decision(probabilities)
    save_nifti_file(nifti_like(scan, label), config.output / f"{name}_prediction.nii.gz")
    if config.save_probability:
        foreground = probabilities[1] if run.num_classes == 2 else np.moveaxis(probabilities[1:], 0, -1)
        save_nifti_file(nifti_like(scan, foreground), config.output / f"{name}_probability.nii.gz")
    if config.save_figure:
        turned, shown = scan.oriented("LAS"), Scan(scan.path, label, scan.affine).oriented("LAS").array
        window = (-125.0, 275.0) if run.preprocessing.normalise == "ct" else None
        save_scan_figure(
            config.output / f"{name}.png", name, turned.array, shown, turned.spacing_mm, run.class_names, window
        )
    ml = abs(np.linalg.det(scan.affine[:3, :3])) / 1000
    counts = {structure: int((label == c).sum()) for c, structure in enumerate(run.class_names, start=1)}
    return [{"scan": name, "structure": s, "volume_ml": n * ml, "voxels": n} for s, n in counts.items()]


def main(config: Config) -> None:
    """Read the run, then segment one scan after the other."""
    if config.input.is_dir() and config.output.resolve().is_relative_to(config.input.resolve()):
        raise UserError(f"--output {config.output} lies in --input, where predictions pass for scans: move it.")
    device = begin(config, lambda _: None)
    run = Run.read(config.run, config.largest_component)
    if config.stride and run.is_3d:
        check_windows(config.stride, run.settings["patch_size"])
    if config.input.is_file():
        scans = {name_of(config.input): config.input}
    else:
        scans = find_scans(config.input)
        if len(scans) == 1 and next(iter(scans.values())).is_dir():  # one series, however deep: the name given counts
            scans = {config.input.resolve().name: config.input}
    if run.trained_on_crops and config.roi is None:
        LOGGER.info("NOTE: this run was trained on crops around the structure; without --roi expect false findings.")
    networks, infer = run.load(config.stage, config.predictor, device), inference_of(run, config)
    rows, failures = [], []
    for name, path in scans.items():
        try:
            scan = read_scan(path)
            roi = check_roi(config.roi, scan) if config.roi else None
            rows += write_results(config, run, name, scan, segment(scan, run.preprocessing, infer, networks, roi))
            LOGGER.info(
                "%s: %s",
                name,
                ", ".join(f"{r['structure']} {r['volume_ml']:.2f} ml" for r in rows if r["scan"] == name),
            )
        except UserError as error:
            failures.append(str(error))
            LOGGER.info("%s: %s", name, error)
    if rows:
        write_csv(config.output / "volumes.csv", rows)
        LOGGER.info("written to %s", config.output)
    if failures:
        raise UserError(f"{len(failures)} of {len(scans)} scans were refused, the first: {failures[0]}")


if __name__ == "__main__":
    run_script(main, Config)
