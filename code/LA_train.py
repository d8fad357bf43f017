"""Train SDCL on LA: `python code/LA_train.py`, with the numbers below or as flags."""

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
        "student_a": "vnet_lowres", "student_b": "resvnet_lowres", "patch_size": (192, 128, 96), "batch_size": 1,
        "optimiser": "muon", "dropout": 0.0, "foreground_prior": 0.08, "ema_decay": 0.95, "average_decay": 0.95,
        "pre_iterations": 200, "self_iterations": 200,
    },
}  # fmt: skip
# Published values of what only some methods read: a changed one is an error where the method ignores it.
PUBLISHED = {"pseudo_label_rule": "threshold", "connectivity": 26, "ema_buffers": False}


@dataclass
class Config:
    """Train on LA: both students on labelled volumes, then what --method says, by default SDCL's self-training.

    The defaults are the published run. A run that was stopped goes on when the same command is given again.
    """

    # --- experiment ---
    root_path: Path = ROOT / "Datasets" / "la"  # the data set's folder, with data/ and data_split/
    models_path: Path = ROOT / "models"  # the run goes into models_path/la_<exp>_<labelnum>_labeled
    exp: str = "SDCL"  # name of the experiment
    labelnum: int = 8  # labelled cases, the first of train.txt: 4, 8, 16 and 80 were published
    recipe: Literal["published", "fast"] = "published"  # fast: RECIPES' values replace those below; flags win
    seed: int = 1337  # of all randomness: weights, crops, masks, dropout
    pretrained: Path | None = None  # folder of another run whose pre-training to start self-training from

    # --- machine (may change when a run goes on) ---
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"  # auto: a CUDA GPU if there is one, else the CPU
    gpu: int = 0  # number of the GPU, from 0
    workers: int = 1  # what prepares batches, the same ones: 1: a thread; more: so many processes
    cuda_graphs: bool = True  # on one CUDA GPU, without compile: queue a network's pass as one, not kernel by kernel
    cache_gb: float = 8.0  # memory for decoded volumes of each of up to 3 lists, GiB; the rest waits in a file on disk
    log_every: int = 20  # iterations between readings of the losses
    save_every: int = 100  # iterations between checkpoints, beside those at each validation
    save_minutes: float = 10.0  # minutes between checkpoints, whichever comes first; 0: iterations alone count

    # --- arithmetic ---
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # of the networks; losses are in float32 always
    compile: bool = False  # let torch.compile fuse the networks' layers, without CUDA graphs; takes minutes at first
    cache_dtype: Literal["float32", "float16"] = "float32"  # of decoded volumes; float16 keeps 3 decimal digits
    deterministic: bool = False  # the same bits in each run on a GPU too, slower

    # --- data (docs/method.md, "Order of the data") ---
    patch_size: tuple[int, int, int] = (112, 112, 80)  # crop, voxels; multiples of 16, of 32 for *_lowres
    batch_size: int = 2  # crops in each of the four batches of an iteration
    labelled_repeat: int = 10  # times the labelled list is read in an epoch (40 iterations)
    unlabelled_repeat: int = 10  # times the unlabelled list is read in an epoch
    unlabelled_crop: Literal["random", "centre"] = "random"  # where unlabelled crops lie; labelled ones are random
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
    pre_iterations: int = 3_200  # pre-training: 80 epochs
    self_iterations: int = 11_000  # self-training: 275 epochs

    # --- method (docs/method.md, "Stage 1", "Stage 2") ---
    method: str = "sdcl"  # sdcl, bcp, cps, ua_mt, mean_teacher or supervised (docs/methods.md); stage 1 is the same
    student_a: Literal["vnet", "resvnet", "vnet_lowres", "resvnet_lowres"] = (
        "vnet"  # network of the first student and the teacher; *_lowres: at half the resolution
    )
    student_b: Literal["vnet", "resvnet", "vnet_lowres", "resvnet_lowres"] = "resvnet"  # network of the second student
    mask_fraction: float = 2 / 3  # side of the copy-paste box over the side of the crop, rounded down: 74 74 53
    dice: Literal["batch", "sample"] = "sample"  # Dice3D: sums per sample and class
    pre_dice: Literal["regions", "whole"] = "whole"  # pre-training's loss: each region of the mix, or the mix whole
    u_weight: float = 0.5  # weight of unlabelled regions, whose target is the pseudo-label
    correct: Literal["discrepancy", "everywhere", "none"] = "discrepancy"  # where the two corrections act (sdcl)
    mse_weight: float = 0.5  # lambda_mse: pull to the target where the students disagree
    kl_weight: float = 0.05  # lambda_kl: entropy where they disagree and this student is wrong
    pseudo_label_rule: Literal["argmax", "threshold"] = "threshold"  # foreground where its probability is at least 0.5
    largest_component: Literal["yes", "no"] = "yes"  # of pseudo-labels only each class's largest component is kept
    connectivity: int = 26  # neighbours of a voxel in a connected component: 6, 18 or 26
    teacher_dropout: Literal["yes", "no"] = "yes"  # whether the teacher drops out, as published
    ema_decay: float = 0.99  # teacher = ema_decay * teacher + (1 - ema_decay) * student a
    ema_buffers: bool = False  # these networks have none
    ema_warmup: bool = False  # the teacher follows faster at first: its decay is at most 1 - 1 / (t + 1) (sdcl, bcp)
    average_decay: float = 0.0  # students are scored and kept as an EMA of self-training's weights; 0: as they are
    consistency_weight: float = 0.1  # of what unlabelled images say (cps, ua_mt, mean_teacher)
    rampup: int | None = None  # iterations until that weight is whole; None: two fifths of self-training (the same)
    noise: float = 0.1  # standard deviation of the inputs' noise, of normalised images (ua_mt, mean_teacher)
    passes: int = 8  # of the teacher, whose entropy says where it is sure (ua_mt)
    paste: Literal["yes", "no"] = "yes"  # no: labelled images as they are (supervised)

    # --- validation and selection ---
    select: Literal["test", "val", "last"] = "test"  # test: on the TEST cases, as published; val: on --val_cases; last
    val_cases: int = 0  # training cases held out for validation, the last unlabelled ones
    pre_val_every: int = 200  # iterations of pre-training between validations (5 epochs); 0: only at the end
    self_val_every: int = 200  # the same for self-training
    decision_rule: Literal["argmax", "threshold"] = "threshold"  # when predicting, foreground is: above 0.5
    stride: tuple[int, int, int] = (18, 18, 4)  # of validation's sliding window, voxels
    window_batch: int = 4  # windows that go through the networks together


def main(config: Config) -> None:
    """Read the data and run both stages."""
    check_root("la", config.root_path)
    from dataloaders.la import DATA_SET  # these take seconds, which a wrong flag need not wait for
    from dataloaders.volumes import VolumeData
    from sdcl.runs.experiment import train

    train(config, VolumeData(DATA_SET, config))


if __name__ == "__main__":
    run_script(main, Config)
