"""Train SDCL on ACDC: `python code/ACDC_train.py`, with the numbers below or as flags."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dataloaders.acdc import CLASS_NAMES, AcdcSlices, check_root, read_volumes, split_by_patients
from dataloaders.files import read_list
from dataloaders.streams import Streams
from sdcl.config import run_script
from sdcl.errors import UserError
from sdcl.evaluation import Task
from sdcl.experiment import begin, train
from sdcl.inference import slice_wise
from sdcl.training import validation_iterations

ROOT = Path(__file__).resolve().parents[1]
NUM_CLASSES = len(CLASS_NAMES) + 1  # with the background


@dataclass
class Config:
    """Train SDCL on ACDC: both students on labelled slices, then self-training with the EMA teacher.

    The defaults are the published run. A run that was stopped goes on when the same command is given again.
    """

    # --- experiment ---
    root_path: Path = ROOT / "Datasets" / "acdc"  # the data set's folder, with data/ and data_split/
    models_path: Path = ROOT / "models"  # the run goes into models_path/acdc_<exp>_<labelnum>_labeled
    exp: str = "SDCL"  # name of the experiment
    labelnum: int = 7  # labelled patients, the first of train_slices.list: 1, 3, 7, 14, 21, 28, 35 or 70 of 70
    seed: int = 1337  # of all randomness: weights, augmentation, masks, dropout
    pretrained: Path | None = None  # folder of another run whose pre-training to start self-training from

    # --- machine (may change when a run goes on) ---
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU if there is one
    gpu: int = 0  # number of the GPU, from 0
    cache_gb: float = 8.0  # memory for decoded slices of each list, GiB; beyond it files are read again each time
    log_every: int = 20  # iterations between readings of the losses
    save_every: int = 500  # iterations between checkpoints, beside those at each validation

    # --- arithmetic ---
    precision: Literal["fp32", "bf16"] = "fp32"  # of the networks; losses are in float32 always
    deterministic: bool = False  # the same bits in each run on a GPU too, slower

    # --- data (docs/method.md, "Order of the data") ---
    patch_size: tuple[int, int] = (256, 256)  # input, pixels; slices are zoomed to it; multiples of 16
    batch_size: int = 12  # slices in each of the four batches of an iteration
    labelled_repeat: int = 10  # times the labelled list is read in an epoch (113 iterations)
    unlabelled_repeat: int = 10  # times the unlabelled list is read in an epoch
    augment_probability: float = 0.5  # of a rotation by k * 90 degrees and a flip; and, of the others, of a rotation
    max_angle_deg: int = 20  # that rotation is by whole degrees in [-max_angle_deg, max_angle_deg)
    shuffle: bool = False  # random order in each epoch instead of the published forwards and backwards

    # --- optimisation ---
    base_lr: float = 1e-3  # Adam's learning rate, each student its own optimiser
    pre_iterations: int = 11_300  # pre-training: 100 epochs
    self_iterations: int = 45_200  # self-training: 400 epochs

    # --- method (docs/method.md, "Stage 1", "Stage 2") ---
    student_a: Literal["unet", "resunet"] = "unet"  # network of the first student and the teacher
    student_b: Literal["unet", "resunet"] = "resunet"  # network of the second student
    mask_fraction: float = 2 / 3  # side of the copy-paste box over the side of the input, rounded down
    dice: Literal["batch", "sample"] = "batch"  # Dice2D: sums over the whole batch
    pre_dice: Literal["regions", "whole"] = "regions"  # pre-training's loss: each region of the mix, or the mix whole
    u_weight: float = 0.5  # weight of unlabelled regions, whose target is the pseudo-label
    mse_weight: float = 0.5  # lambda_mse: pull to the target where the students disagree
    kl_weight: float = 0.05  # lambda_kl: entropy where they disagree and this student is wrong
    pseudo_label_rule: Literal["argmax", "threshold"] = "argmax"  # the teacher's decision
    connectivity: int = 8  # neighbours of a pixel in a connected component: 4 or 8
    ema_decay: float = 0.99  # teacher = ema_decay * teacher + (1 - ema_decay) * student a
    ema_buffers: bool = True  # average BatchNorm's statistics too

    # --- validation and selection ---
    pre_val_from: int = 5_650  # first validation of pre-training, iterations (epoch 50), beside the last
    pre_val_every: int = 565  # iterations between validations (5 epochs); 0: only at the end
    self_val_every: int = 200  # the same for self-training
    select: Literal["val", "last"] = "val"  # self-training starts from stage 1's best on val, or from its last


def check(config: Config) -> None:
    """Refuse a configuration that cannot be trained."""
    check_root(config.root_path)
    if config.pseudo_label_rule == "threshold":
        raise UserError(f"--pseudo_label_rule threshold is for two classes, not {NUM_CLASSES}: use argmax.")
    if config.connectivity not in (4, 8):
        raise UserError(f"--connectivity is {config.connectivity}: slices know 4 or 8 neighbours.")


def main(config: Config) -> None:
    """Read the data and run both stages."""
    device = begin(config, check)
    slices = read_list(config.root_path / "data_split" / "train_slices.list")
    labelled_names, unlabelled_names = split_by_patients(slices, config.labelnum)
    if not unlabelled_names and config.self_iterations:
        raise UserError(
            f"--labelnum {config.labelnum} leaves no unlabelled patients: lower it, or give --self_iterations 0 "
            "for supervised pre-training alone."
        )

    def infer(networks, volume):
        return slice_wise(networks, volume, config.patch_size, NUM_CLASSES, config.batch_size, config.precision)

    def slices_of(names, labelled):
        return AcdcSlices(
            config.root_path, names, size=config.patch_size, num_classes=NUM_CLASSES, cache_gb=config.cache_gb,
            labelled=labelled, augment_probability=config.augment_probability, max_angle_deg=config.max_angle_deg,
        )  # fmt: skip

    labelled = slices_of(labelled_names, labelled=True)
    unlabelled = slices_of(unlabelled_names, labelled=False) if config.self_iterations else None
    train(
        config,
        Task("acdc", CLASS_NAMES, infer),
        device,
        make_streams=lambda with_unlabelled: Streams.of(config, labelled, unlabelled if with_unlabelled else None),
        cases=read_volumes(config.root_path, "val", NUM_CLASSES),
        validated_on="val",
        pre_val_at=validation_iterations(config.pre_val_from, config.pre_val_every, config.pre_iterations),
        self_val_at=validation_iterations(config.self_val_every, config.self_val_every, config.self_iterations),
    )


if __name__ == "__main__":
    run_script(main, Config)
