"""Train SDCL on ACDC: `python code/ACDC_train.py`, with the numbers below or as flags."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code, whichever is installed

from dataloaders.roots import check_root
from sdcl.runs.config import run_script

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {  # docs/speedrun.md
    "fast": {
        "batch_size": 6, "shuffle": True, "augment_probability": 0.0, "intensity": 0.4, "pre_dice": "whole",
        "optimiser": "muon", "dropout": 0.0, "foreground_prior": 0.05, "ema_decay": 0.95, "average_decay": 0.95,
        "pre_iterations": 150, "self_iterations": 500,
    },
}  # fmt: skip
# Published values of what only some methods read: a changed one is an error where the method ignores it.
PUBLISHED = {"pseudo_label_rule": "argmax", "connectivity": 8, "ema_buffers": True}


@dataclass
class Config:
    """Train on ACDC: both students on labelled slices, then what --method says, by default SDCL's self-training.

    The defaults are the published run. A run that was stopped goes on when the same command is given again.
    """

    # --- experiment ---
    root_path: Path = ROOT / "Datasets" / "acdc"  # the data set's folder, with data/ and data_split/
    models_path: Path = ROOT / "models"  # the run goes into models_path/acdc_<exp>_<labelnum>_labeled
    exp: str = "SDCL"  # name of the experiment
    labelnum: int = 7  # labelled patients, the first of train_slices.list: 1, 3, 7, 14, 21, 28, 35 or 70 of 70
    recipe: Literal["published", "fast"] = "published"  # fast: RECIPES' values replace those below; flags win
    seed: int = 1337  # of all randomness: weights, augmentation, masks, dropout
    pretrained: Path | None = None  # folder of another run whose pre-training to start self-training from

    # --- machine (may change when a run goes on) ---
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"  # auto: a CUDA GPU if there is one, else the CPU
    gpu: int = 0  # number of the GPU, from 0
    workers: int = 1  # what prepares batches, the same ones: 1: a thread; more: so many processes
    cuda_graphs: bool = True  # on one CUDA GPU, without compile: queue a network's pass as one, not kernel by kernel
    cache_gb: float = 8.0  # memory for decoded slices of each of up to 3 lists, GiB; the rest waits in a file on disk
    log_every: int = 20  # iterations between readings of the losses
    save_every: int = 500  # iterations between checkpoints, beside those at each validation
    save_minutes: float = 10.0  # minutes between checkpoints, whichever comes first; 0: iterations alone count

    # --- arithmetic ---
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # of the networks; losses are in float32 always
    compile: bool = False  # let torch.compile fuse the networks' layers, without CUDA graphs; takes minutes at first
    deterministic: bool = False  # the same bits in each run on a GPU too, slower

    # --- data (docs/method.md, "Order of the data") ---
    patch_size: tuple[int, int] = (256, 256)  # input, pixels; slices are zoomed to it; multiples of 16
    batch_size: int = 12  # slices in each of the four batches of an iteration
    labelled_repeat: int = 10  # times the labelled list is read in an epoch (113 iterations)
    unlabelled_repeat: int = 10  # times the unlabelled list is read in an epoch
    augment_probability: float = 0.5  # of a rotation by k * 90 degrees and a flip; and, of the others, of a rotation
    max_angle_deg: int = 20  # that rotation is by whole degrees in [-max_angle_deg, max_angle_deg)
    intensity: float = 0.0  # strength of random changes of contrast, brightness and gamma, in [0, 1); 0: none
    shuffle: bool = False  # random order in each epoch instead of the published forwards and backwards

    # --- optimisation ---
    optimiser: Literal["adam", "muon"] = "adam"  # each student its own; muon: convolutions' steps made orthogonal
    base_lr: float = 1e-3  # learning rate
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # of self-training; not constant: it falls to 0
    warmup: int = 0  # iterations at each stage's beginning over which the learning rate rises
    weight_decay: float = 0.0  # decoupled (AdamW), of every weight; 0: none
    dropout: float = 1.0  # share of the networks' published rates of dropout, in [0, 1]
    foreground_prior: float = 0.0  # probability of foreground that the last biases start at; 0: as they are drawn
    pre_iterations: int = 11_300  # pre-training: 100 epochs
    self_iterations: int = 45_200  # self-training: 400 epochs

    # --- method (docs/method.md, "Stage 1", "Stage 2") ---
    method: str = "sdcl"  # sdcl, bcp, cps, ua_mt, mean_teacher or supervised (docs/methods.md); stage 1 is the same
    student_a: Literal["unet", "resunet"] = "unet"  # network of the first student and the teacher
    student_b: Literal["unet", "resunet"] = "resunet"  # network of the second student
    mask_fraction: float = 2 / 3  # side of the copy-paste box over the side of the input, rounded down
    dice: Literal["batch", "sample"] = "batch"  # Dice2D: sums over the whole batch
    pre_dice: Literal["regions", "whole"] = "regions"  # pre-training's loss: each region of the mix, or the mix whole
    u_weight: float = 0.5  # weight of unlabelled regions, whose target is the pseudo-label
    correct: Literal["discrepancy", "everywhere", "none"] = "discrepancy"  # where the two corrections act (sdcl)
    mse_weight: float = 0.5  # lambda_mse: pull to the target where the students disagree
    kl_weight: float = 0.05  # lambda_kl: entropy where they disagree and this student is wrong
    pseudo_label_rule: Literal["argmax", "threshold"] = "argmax"  # the teacher's decision
    largest_component: Literal["yes", "no"] = "yes"  # of pseudo-labels only each class's largest component is kept
    connectivity: int = 8  # neighbours of a pixel in a connected component: 4 or 8
    teacher_dropout: Literal["yes", "no"] = "yes"  # whether the teacher drops out, as published
    ema_decay: float = 0.99  # teacher = ema_decay * teacher + (1 - ema_decay) * student a
    ema_buffers: bool = True  # average BatchNorm's statistics too
    ema_warmup: bool = False  # the teacher follows faster at first: its decay is at most 1 - 1 / (t + 1) (sdcl, bcp)
    average_decay: float = 0.0  # students are scored and kept as an EMA of self-training's weights; 0: as they are
    consistency_weight: float = 0.1  # of what unlabelled images say (cps, ua_mt, mean_teacher)
    rampup: int | None = None  # iterations until that weight is whole; None: two fifths of self-training (the same)
    noise: float = 0.1  # standard deviation of the inputs' noise, of normalised images (ua_mt, mean_teacher)
    passes: int = 8  # of the teacher, whose entropy says where it is sure (ua_mt)
    paste: Literal["yes", "no"] = "yes"  # no: labelled images as they are (supervised)

    # --- validation and selection ---
    pre_val_from: int = 5_650  # first validation of pre-training, iterations (epoch 50), beside the last
    pre_val_every: int = 565  # iterations between validations (5 epochs); 0: only at the end
    self_val_every: int = 200  # the same for self-training
    select: Literal["val", "last"] = "val"  # self-training starts from stage 1's best on val, or from its last


def main(config: Config) -> None:
    """Read the data and run both stages."""
    check_root("acdc", config.root_path)
    from dataloaders.acdc import DATA_SET  # these take seconds, which a wrong flag need not wait for
    from dataloaders.slices import SliceData
    from sdcl.runs.experiment import train

    train(config, SliceData(DATA_SET, config))


if __name__ == "__main__":
    run_script(main, Config)
