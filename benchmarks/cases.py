"""What is measured: each case does the same work in our way and in the textbook's."""

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import textbook
import textbook_data
import torch
from scipy import ndimage
from torch import nn

from dataloaders.cache import Decoding
from dataloaders.files import sample_rng
from dataloaders.slices import Slices
from dataloaders.streams import Order, Streams
from dataloaders.transforms import Augmentation, Cropping
from dataloaders.volumes import CroppedVolumes
from sdcl.graphs import recorded
from sdcl.inference import Slabs, Windows, slice_slabs, window_slabs
from sdcl.losses import discrepancy, mixed_losses
from sdcl.methods.sdcl import self_train_step
from sdcl.metrics import case_metrics
from sdcl.mixing import box_size, copy_paste_mask
from sdcl.networks import build_network
from sdcl.pseudo_labels import pseudo_label
from sdcl.runs.devices import place
from sdcl.scoring.evaluation import PREDICTORS, STUDENTS, Case, Decision, Predictors, Task, evaluate
from sdcl.steps import add_teacher, make_learners

Run = Callable[[], dict[str, float]]  # does the work once and returns figures that both ways must share


@dataclass(frozen=True)
class Work:
    """The published sizes and settings of a data set, or smaller ones; what the steps read of a header, too."""

    data_set: str
    networks: tuple[str, str]
    shape: tuple[int, ...]  # of the networks' input
    batch_size: int
    classes: int
    volume: tuple[int, ...]  # to predict, in voxels
    stride: tuple[int, ...]
    connectivity: int
    pseudo_label_rule: str
    dice: str
    ema_buffers: bool
    files: tuple[int, ...]  # shape of the files that the streams read
    precision: str = "fp32"
    device: str = "cpu"
    u_weight: float = 0.5
    mse_weight: float = 0.5
    kl_weight: float = 0.05
    ema_decay: float = 0.99
    ema_warmup: bool = False
    correct: str = "discrepancy"
    largest_component: str = "yes"


ACDC = Work("acdc", ("unet", "resunet"), (256, 256), 12, 4, (10, 256, 216), (), 8, "argmax", "batch", True, (256, 216))
LA = Work("la", ("vnet", "resvnet"), (112, 112, 80), 2, 2, (130, 130, 84), (18, 18, 4), 26, "threshold", "sample",
          False, (194, 142, 88))  # fmt: skip


def losses(work: Work, is_ours: bool) -> Run:
    """Forward and backward pass of the losses of one student and mix."""
    torch.manual_seed(0)
    a, b = torch.randn(2, work.batch_size, work.classes, *work.shape, device=work.device)
    b = a + 0.3 * b  # the students disagree on a tenth of the voxels or so
    image_label, patch_label = torch.randint(work.classes, (2, work.batch_size, *work.shape), dtype=torch.uint8)
    image_label, patch_label = image_label.to(work.device), patch_label.to(work.device)
    mask, where = _mask(work), discrepancy(a, b)

    def run() -> dict[str, float]:
        z = a.detach().requires_grad_()
        if is_ours:
            found = mixed_losses(
                z, image_label, patch_label, mask, image_weight=0.5, patch_weight=1.0, dice=work.dice,
                discrepancy=where,
            )  # fmt: skip
        else:
            found = textbook.mixed_losses(z, image_label, patch_label, mask, 0.5, 1.0, work.dice, where)
        loss = (found["dice"] + found["ce"]) / 2 + 0.5 * found["mse"] + 0.05 * found["kl"]
        loss.backward()
        return {"loss": loss.item(), "gradient": z.grad.norm().item()}

    return run


def labels(work: Work, is_ours: bool) -> Run:
    """Pseudo-labels of one batch, from logits as smooth as a network's."""
    noise = np.random.default_rng(0).standard_normal((work.batch_size, work.classes, *work.shape))
    smooth = ndimage.gaussian_filter(noise, (0, 0, *(4 for _ in work.shape)), mode="wrap")
    logits = torch.from_numpy(smooth).float().to(work.device)
    label = pseudo_label if is_ours else textbook.pseudo_label
    return lambda: {"foreground": float((label(logits, work.pseudo_label_rule, work.connectivity) > 0).sum())}


def step(work: Work, is_ours: bool) -> Run:
    """One step of self-training; the first one, for the comparison, without dropout."""
    students = _students(work)
    generator = torch.Generator().manual_seed(0)
    batch = {k: torch.randn(work.batch_size, 1, *work.shape, generator=generator) for k in ("x_a", "x_b", "u_a", "u_b")}
    batch |= {f"y_{d}": (batch[f"x_{d}"][:, 0] > 1).to(torch.uint8) for d in "ab"}
    batch, mask = {key: value.to(work.device) for key, value in batch.items()}, _mask(work)
    learners = make_learners(*_placed(students, work, is_ours), 1e-3)
    add_teacher(learners)
    roles = dict(zip(STUDENTS, students, strict=True))
    plain = {role: torch.optim.Adam(s.parameters(), lr=1e-3, foreach=False) for role, s in roles.items()}
    dropouts = [m for n in learners.networks.values() for m in n.modules() if isinstance(m, nn.Dropout | nn.Dropout3d)]
    rates = [module.p for module in dropouts]
    for module in dropouts:
        module.p = 0.0
    passes = contextlib.ExitStack()
    if is_ours and work.device == "cuda":  # as the scripts do
        passes.enter_context(recorded(learners.networks.values()))

    def run() -> dict[str, float]:
        if is_ours:
            found = self_train_step(learners, batch, mask, work)
        else:
            found = textbook.self_train_step(roles, learners.networks["teacher"], plain, batch, mask, work)
        for module, rate in zip(dropouts, rates, strict=True):
            module.p = rate
        return {name: float(found[f"{name}/loss"]) for name in STUDENTS}

    run.passes = passes  # to the process's end
    return run


def streams(work: Work, is_ours: bool) -> Run:
    """One batch of samples from files of the published size, augmented (ACDC) or cropped (LA), in one process."""
    folder = tempfile.TemporaryDirectory(prefix="streams_", ignore_cleanup_errors=True)
    rng, is_2d = np.random.default_rng(0), len(work.files) == 2
    paths = [Path(folder.name, f"{k}.h5") for k in range(24 if is_2d else 4)]
    for path in paths:
        image = ndimage.gaussian_filter(rng.standard_normal(work.files), 2).astype(np.float32)
        with h5py.File(path, "w") as file:
            file.create_dataset("image", data=image, compression="gzip")
            file.create_dataset("label", data=(image > 0.1).astype(np.uint8), compression="gzip")
    decoding = Decoding(work.classes, labelled=True, cache_gb=8)
    if is_2d:
        root = Path(folder.name)
        (root / "data").mkdir()
        paths = [path.rename(root / "data" / path.name) for path in paths]
        cases = Slices(root, [path.stem for path in paths], decoding, Augmentation(work.shape))
        read = textbook_data.augmented_slice
    else:
        named = {path.stem: path for path in paths}
        cases = CroppedVolumes(named, decoding, Cropping(work.shape))
        read = textbook_data.random_crop
    stream = Streams(cases, None, Order(work.batch_size, 12, seed=1))
    iteration = iter(range(10**9))

    def run() -> dict[str, float]:
        number = next(iteration)
        if is_ours:
            batch = stream.batch(number)
            image, label = batch["x_a"][:, 0].numpy(), batch["y_a"].numpy()
        else:
            position = number % stream.iterations_per_epoch * work.batch_size
            samples = []
            for d, order in (("a", np.tile(paths, 12)), ("b", np.tile(paths, 12)[::-1])):
                chosen = enumerate(order[position : position + work.batch_size])
                drawn = [
                    read(path, work.shape, sample_rng(1, "pre_train", f"x{d}", number, place)) for place, path in chosen
                ]
                samples.append([np.stack(arrays) for arrays in zip(*drawn, strict=True)])
            image, label = samples[0]
        return {"image": float(image.sum(dtype=np.float64)), "label": float(label.sum())}

    run.folder = folder  # lives as long as the function
    return run


def evaluation(work: Work, is_ours: bool) -> Run:
    """Predict one volume with both students and their mean, window by window or slice by slice, and score it."""
    students = [Decided(student) for student in _placed(_students(work), work, is_ours)]
    roles = dict(zip(STUDENTS, students, strict=True))
    is_2d = len(work.shape) == 2
    distance, rough = _ellipsoid(work.volume)
    image, reference = (1 - distance - 2 * rough).astype(np.float32), (distance < 1) * np.uint8(work.classes - 1)

    def ours(networks: list[nn.Module], volume: np.ndarray) -> Slabs:
        if is_2d:
            return slice_slabs(networks, volume, work.shape, work.classes, work.batch_size, work.precision)
        return window_slabs(networks, volume, Windows(work.shape, work.stride, work.classes, precision=work.precision))

    def theirs(networks: list[nn.Module]) -> np.ndarray:
        if is_2d:
            return textbook_data.slice_wise(networks, image, work.shape)
        return textbook_data.sliding_window(networks, image, work.shape, work.stride, work.classes)[1] > 0.5

    def run() -> dict[str, float]:
        if not is_ours:
            maps = {name: theirs([roles[role] for role in members]) for name, members in PREDICTORS.items()}
            return {
                name: _textbook_scores(label_map, reference, range(1, work.classes)) for name, label_map in maps.items()
            }
        task = Task("t", [str(c) for c in range(1, work.classes)], ours, Decision("argmax" if is_2d else "threshold"))
        rows = evaluate(Predictors.of(roles, PREDICTORS), [Case("c", image, reference)], task)
        return {name: float(np.nanmean([r.dice for r in rows if r.predictor == name])) for name in PREDICTORS}

    return run


def metrics(work: Work, is_ours: bool) -> Run:
    """Dice, Jaccard, 95HD and ASD of one structure of a whole volume."""
    distance, rough = _ellipsoid(work.files)
    prediction, reference = distance + 4 * rough < 1, distance < 1

    def run() -> dict[str, float]:
        if is_ours:
            found = case_metrics(prediction, reference)
            return {"dice": found.dice, "hd95": found.hd95, "asd": found.asd}
        dice, _, hd95, asd = textbook_data.case_metrics(prediction, reference)
        return {"dice": dice, "hd95": hd95, "asd": asd}

    return run


CASES = {f.__name__: f for f in (losses, labels, step, streams, evaluation, metrics)}


def _mask(work: Work) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return copy_paste_mask(work.shape, box_size(work.shape, 2 / 3), generator).to(work.device)


def _students(work: Work) -> list[nn.Module]:
    torch.manual_seed(0)
    return [build_network(name, work.classes).to(work.device).train() for name in work.networks]


def _placed(students: list[nn.Module], work: Work, is_ours: bool) -> list[nn.Module]:
    """Give our networks the memory layout that the scripts give them."""
    return [place(student, torch.device(work.device)) for student in students] if is_ours else students


def _ellipsoid(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the squared distance from the centre in radii of an ellipsoid, and smooth noise to roughen it."""
    distance = sum(((np.arange(n) - n / 2) / (0.25 * n)).reshape([-1 if a == b else 1 for b in range(3)]) ** 2
                   for a, n in enumerate(shape))  # fmt: skip
    return distance, ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(shape), 5)


class Decided(nn.Module):
    """A network that decides as a trained one would, for one object: noise would be nothing but surface to score."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, 1, *S) to logits (N, C, *S), of the last class where x is above 0."""
        logits = 1e-3 * self.network(x)
        logits[:, -1] += x[:, 0]
        return logits


def _textbook_scores(label_map: np.ndarray, reference: np.ndarray, classes: range) -> float:
    """Compute all four metrics of every structure where both masks have voxels; return the mean Dice."""
    dices = []
    for c in classes:
        prediction, truth = label_map == c, reference == c
        both = prediction.any() and truth.any()
        neither = not prediction.any() and not truth.any()
        dices.append(textbook_data.case_metrics(prediction, truth)[0] if both else np.nan if neither else 0.0)
    return float(np.nanmean(dices))
