"""Train SDCL on a data set of your own: `python code/own_train.py --root_path Datasets/mine`; see docs/own_data.md."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code, whichever is installed

from dataloaders.roots import check_root
from sdcl.runs.config import run_script
from sdcl.runs.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
# What is None in the header follows from the data set's layout: the published settings of LA, or of ACDC.
IN_3D = {
    "patch_size": (112, 112, 80), "batch_size": 2, "student_a": "vnet", "student_b": "resvnet", "dice": "sample",
    "pre_dice": "whole", "connectivity": 26, "ema_buffers": False,
}  # fmt: skip
IN_2D = {
    "patch_size": (256, 256), "batch_size": 12, "student_a": "unet", "student_b": "resunet", "dice": "batch",
    "pre_dice": "regions", "connectivity": 8, "ema_buffers": True,
}  # fmt: skip
# Published values of what only some methods read: a changed one is an error where the method ignores it.
PUBLISHED = {"pseudo_label_rule": "argmax", "connectivity": None, "ema_buffers": None}


@dataclass
class Config:
    """Train on imported scans, in 3D or 2D: both students on labelled cases, then what --method says, by default SDCL.

    A run that was stopped goes on when the same command is given again.
    """

    root_path: Path  # the data set's folder, as dataloaders/import_nifti.py wrote it

    # --- experiment ---
    models_path: Path = ROOT / "models"  # the run goes into models_path/<data set>_<exp>_<labelnum>_labeled
    exp: str = "SDCL"  # name of the experiment
    labelnum: int = 0  # labelled cases, the first of the training list; 0: all that have a label
    seed: int = 1337  # of all randomness: weights, crops, masks, dropout
    pretrained: Path | None = None  # folder of another run whose pre-training to start self-training from

    # --- machine (may change when a run goes on) ---
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"  # auto: a CUDA GPU if there is one, else the CPU
    gpu: int = 0  # number of the GPU, from 0
    workers: int = 1  # what prepares batches, the same ones: 1: a thread; more: so many processes
    cuda_graphs: bool = True  # on one CUDA GPU, without compile: queue a network's pass as one, not kernel by kernel
    cache_gb: float = 8.0  # memory for decoded cases of each of up to 3 lists, GiB; the rest waits in a file on disk
    log_every: int = 20  # iterations between readings of the losses
    save_every: int = 500  # iterations between checkpoints, beside those at each validation
    save_minutes: float = 10.0  # minutes between checkpoints, whichever comes first; 0: iterations alone count

    # --- arithmetic ---
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # of the networks; losses are in float32 always
    compile: bool = False  # let torch.compile fuse the networks' layers, without CUDA graphs; takes minutes at first
    deterministic: bool = False  # the same bits in each run on a GPU too, slower

    # --- data ---
    patch_size: tuple[int, ...] | None = None  # crop (3D) or input (2D), voxels; multiples of 16, for *_lowres 32
    batch_size: int | None = None  # samples in each of the four batches of an iteration
    labelled_repeat: int = 10  # times the labelled list is read in an epoch
    unlabelled_repeat: int = 10  # times the unlabelled list is read in an epoch
    unlabelled_crop: Literal["random", "centre"] = "random"  # where unlabelled crops lie (3D)
    cache_dtype: Literal["float32", "float16"] = "float32"  # of decoded volumes in memory (3D)
    augment_probability: float = 0.5  # of a rotation by k * 90 degrees and a flip; and, else, of a rotation (2D)
    max_angle_deg: int = 20  # that rotation is by whole degrees in [-max_angle_deg, max_angle_deg) (2D)
    intensity: float = 0.0  # strength of random changes of contrast, brightness and gamma, in [0, 1); 0: none
    shuffle: bool = True  # random order in each epoch instead of the published forwards and backwards

    # --- optimisation ---
    optimiser: Literal["adam", "muon"] = "adam"  # each student its own; muon: convolutions' steps made orthogonal
    base_lr: float = 1e-3  # learning rate
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # of self-training; not constant: it falls to 0
    warmup: int = 0  # iterations at each stage's beginning over which the learning rate rises
    weight_decay: float = 0.0  # decoupled (AdamW), of every weight; 0: none
    dropout: float = 1.0  # share of the networks' published rates of dropout, in [0, 1]
    foreground_prior: float = 0.0  # probability of foreground that the last biases start at; 0: as they are drawn
    pre_iterations: int = 3_200  # pre-training
    self_iterations: int = 11_000  # self-training

    # --- method (docs/method.md, "Stage 1", "Stage 2") ---
    method: str = "sdcl"  # sdcl, bcp, cps, ua_mt, mean_teacher or supervised (docs/methods.md); stage 1 is the same
    student_a: Literal["vnet", "resvnet", "unet", "resunet", "vnet_lowres", "resvnet_lowres"] | None = (
        None  # network of the first student and the teacher; *_lowres: 3D at half the resolution
    )
    student_b: Literal["vnet", "resvnet", "unet", "resunet", "vnet_lowres", "resvnet_lowres"] | None = (
        None  # network of the second student
    )
    mask_fraction: float = 2 / 3  # side of the copy-paste box over the side of the sample, rounded down
    dice: Literal["batch", "sample"] | None = None  # sums over the whole batch, or per sample and class
    pre_dice: Literal["regions", "whole"] | None = None  # pre-training's loss: each region of the mix, or the mix whole
    u_weight: float = 0.5  # weight of unlabelled regions, whose target is the pseudo-label
    correct: Literal["discrepancy", "everywhere", "none"] = "discrepancy"  # where the two corrections act (sdcl)
    mse_weight: float = 0.5  # lambda_mse: pull to the target where the students disagree
    kl_weight: float = 0.05  # lambda_kl: entropy where they disagree and this student is wrong
    pseudo_label_rule: Literal["argmax", "threshold"] = "argmax"  # the teacher's decision
    largest_component: Literal["yes", "no"] = "yes"  # of pseudo-labels only each class's largest component is kept
    connectivity: int | None = None  # neighbours in a connected component: 6, 18, 26 (3D); 4, 8 (2D)
    teacher_dropout: Literal["yes", "no"] = "yes"  # whether the teacher drops out, as published
    ema_decay: float = 0.99  # teacher = ema_decay * teacher + (1 - ema_decay) * student a
    ema_buffers: bool | None = None  # average BatchNorm's statistics too
    ema_warmup: bool = False  # the teacher follows faster at first: its decay is at most 1 - 1 / (t + 1) (sdcl, bcp)
    average_decay: float = 0.0  # students are scored and kept as an EMA of self-training's weights; 0: as they are
    consistency_weight: float = 0.1  # of what unlabelled images say (cps, ua_mt, mean_teacher)
    rampup: int | None = None  # iterations until that weight is whole; None: two fifths of self-training (the same)
    noise: float = 0.1  # standard deviation of the inputs' noise, of normalised images (ua_mt, mean_teacher)
    passes: int = 8  # of the teacher, whose entropy says where it is sure (ua_mt)
    paste: Literal["yes", "no"] = "yes"  # no: labelled images as they are (supervised)

    # --- validation and selection ---
    select: Literal["val", "last"] | None = None  # None: val if the data set has validation cases, else last
    val_cases: int = 0  # unlabelled training cases held out for validation, if they have labels (3D)
    pre_val_from: int = 200  # first validation of pre-training, iterations (2D)
    pre_val_every: int = 200  # iterations of pre-training between validations; 0: only at the end
    self_val_every: int = 200  # the same for self-training
    decision_rule: Literal["argmax", "threshold"] = "argmax"  # when predicting
    stride: tuple[int, int, int] | None = None  # of validation's sliding window, voxels; None: half a window (3D)
    window_batch: int = 4  # windows that go through the networks together (3D)


def main(config: Config) -> None:
    """Fill in what follows from the data set, read the data and run both stages."""
    check_root("own", config.root_path)
    from dataloaders.own import count_labelled, has_val, read_data_set  # these take seconds, a wrong flag does not
    from dataloaders.slices import SliceData
    from dataloaders.volumes import VolumeData
    from sdcl.methods import check_settings
    from sdcl.runs.experiment import train

    check_settings(config)
    data_set = read_data_set(config.root_path)
    is_3d = data_set.preprocessing.layout == "volume"
    given = {name: value for name, value in vars(config).items() if value is not None}
    config = dataclasses.replace(config, **((IN_3D if is_3d else IN_2D) | given))
    labelled = count_labelled(config.root_path, data_set)
    if config.labelnum > labelled:
        raise UserError(f"--labelnum is {config.labelnum}, but {labelled} training cases have a label: lower it.")
    config.labelnum = config.labelnum or labelled
    config.select = config.select or ("val" if has_val(config.root_path) else "last")
    if is_3d:
        config.stride = config.stride or tuple(max(side // 2, 1) for side in config.patch_size)
    train(config, (VolumeData if is_3d else SliceData)(data_set, config), IN_3D if is_3d else IN_2D)


if __name__ == "__main__":
    run_script(main, Config)
