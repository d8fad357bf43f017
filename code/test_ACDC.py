"""Test SDCL on ACDC: `python code/test_ACDC.py`, with the settings below or as flags."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dataloaders.acdc import CLASS_NAMES, check_root, read_volumes
from sdcl.checkpoints import load_weights
from sdcl.config import check_common, run_script, select_device
from sdcl.errors import UserError
from sdcl.evaluation import PREDICTORS, STUDENTS, Predictors, load_predictors
from sdcl.inference import slice_wise
from sdcl.networks import build_network
from sdcl.report import write_test
from sdcl.runs import LOGGER, read_config, run_folder, start_logging

ROOT = Path(__file__).resolve().parents[1]
NUM_CLASSES = len(CLASS_NAMES) + 1  # with background


@dataclass
class Config:
    """Score a run on ACDC: each student and their mean, at the selected and at the last checkpoint, in one pass."""

    # --- what to test ---
    root_path: Path = ROOT / "Datasets" / "acdc"  # the data set's folder, with data/ and data_split/
    models_path: Path = ROOT / "models"  # where the run is: models_path/acdc_<exp>_<labelnum>_labeled
    exp: str = "SDCL"  # the run's --exp
    labelnum: int = 7  # the run's --labelnum
    stage: Literal["self_train", "pre_train"] = "self_train"  # whose checkpoints
    split: Literal["val", "test"] = "test"  # which volumes: 20 of 10 patients, or 40 of 20 patients
    student_a_weights: Path | None = None  # test these weights (published or yours) instead of the run's; with the next
    student_b_weights: Path | None = None  # the second student's

    # --- how ---
    protocol: Literal["default", "paper"] = "default"  # paper: an empty mask scores 0 in all four metrics
    patch_size: tuple[int, int] = (256, 256)  # input, pixels; a run's own replaces it
    student_a: Literal["unet", "resunet"] = "unet"  # network of --student_a_weights; a run's own replaces it
    student_b: Literal["unet", "resunet"] = "resunet"  # network of --student_b_weights; a run's own replaces it
    batch_size: int = 16  # slices that go through the networks together
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU if there is one
    gpu: int = 0  # number of the GPU, from 0
    precision: Literal["fp32", "bf16"] = "fp32"  # of the networks


def main(config: Config) -> None:
    """Load the networks, score the volumes, print and write tables and a figure."""
    start_logging()
    check_common(config)
    check_root(config.root_path)
    device = select_device(config.device, config.gpu)
    run = run_folder(config.models_path, "acdc", config.exp, config.labelnum)
    files = dict(zip(STUDENTS, (config.student_a_weights, config.student_b_weights), strict=True))
    if any(files.values()) and not all(files.values()):
        raise UserError("--student_a_weights and --student_b_weights belong together: give both or none.")
    trained = vars(config) if all(files.values()) else read_config(run)
    size = tuple(trained["patch_size"])

    def make_student(role):
        return build_network(trained[role], NUM_CLASSES).to(device)

    if all(files.values()):
        networks = [make_student(role) for role in STUDENTS]
        for network, path in zip(networks, files.values(), strict=True):
            LOGGER.info("%s", load_weights(network, path))
        predictors = Predictors(networks, PREDICTORS)
    else:
        predictors = load_predictors(run / config.stage, make_student, selected_on="val")
    cases = read_volumes(config.root_path, config.split, NUM_CLASSES)

    def infer(networks, volume):
        return slice_wise(networks, volume, size, NUM_CLASSES, config.batch_size, config.precision)

    folder = run / "test" / f"{config.stage}_{config.split}"
    facts = {"split": config.split, "stage": config.stage}
    write_test(folder, predictors, cases, infer, CLASS_NAMES, config.protocol, facts)
    if config.split == "val" and not all(files.values()):
        LOGGER.info("The rows 'best on val' were selected on these volumes, which flatters them; 'last' was not.")


if __name__ == "__main__":
    run_script(main, Config)
