"""Training of a small network that finds where in a whole scan, seen coarsely, a structure lies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from tqdm import tqdm

from sdcl.inference import whole_window
from sdcl.losses import mixed_losses
from sdcl.networks import build_network
from sdcl.runs.devices import place
from sdcl.runs.errors import UserError
from sdcl.schedule import share

NETWORK = "vnet"
CLASSES = 2  # the structure and what it is not
LONGEST = 96  # voxels: a longer training window would take minutes an iteration; longer scans are cut to it
ZOOM = 0.15  # log of the largest enlargement
GAIN, OFFSET, NOISE = 0.25, 0.25, 0.15  # of intensities: relative; and in the scan's standard deviations


@dataclass(frozen=True)
class Sample:
    """A scan seen coarsely.

    Attributes:
        image: float32 (X, Y, Z), normalised.
        mask: uint8 (X, Y, Z), 1 within the structure, which is there.
    """

    image: np.ndarray
    mask: np.ndarray


def train_locator(samples: Sequence[Sample], settings: Any, device: torch.device, title: str = "") -> nn.Module:
    """Train a V-Net on scans seen coarsely: Dice and cross-entropy, shifted, zoomed and cut anew at each reading.

    Nothing is mirrored: where the structure lies in the body is what is to be learned.

    Args:
        samples: the scans; sides may differ.
        settings: a header with iterations, batch_size, base_lr, seed and precision.
        device: where to compute.
        title: of the progress bar.

    Returns:
        The network, in evaluation mode: (N, 1, *S) to logits (N, 2, *S). The same samples and settings give the same
        weights on a CPU.

    Raises:
        UserError: the loss is no longer finite.
    """
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    network = place(build_network(NETWORK, CLASSES), device).train()
    for layer in network.modules():
        if isinstance(layer, nn.Dropout3d):
            layer.p = 0.0  # so short a training needs what it has learned
    optimiser = torch.optim.Adam(network.parameters(), lr=settings.base_lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: share(i + 1, settings.iterations, "linear", 0))
    window = training_window([sample.image.shape for sample in samples])
    order: list[int] = []
    for _ in tqdm(range(settings.iterations), desc=title, unit="it", leave=False, dynamic_ncols=True, disable=None):
        while len(order) < settings.batch_size:
            order += rng.permutation(len(samples)).tolist()
        chosen, order = order[: settings.batch_size], order[settings.batch_size :]
        images, masks = _batch([samples[k] for k in chosen], window, rng, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            logits = network(images)
        losses = mixed_losses(logits, masks, masks, None, image_weight=1, patch_weight=0, dice="sample")
        loss = losses["dice"] + losses["ce"]
        if not torch.isfinite(loss):
            raise UserError(f"the loss is {loss.item()}, no longer finite: lower --base_lr, or look at the scans.")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    return network.eval()


def training_window(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the sides of the window that holds every one of some volumes, each at most LONGEST voxels."""
    return whole_window([min(max(sides), LONGEST) for sides in zip(*shapes, strict=True)])


def augmented(sample: Sample, window: Sequence[int], rng: np.random.Generator) -> Sample:
    """Show a scan in a window as another one might be: zoomed, shifted, cut round the structure, brighter, noisier.

    Args:
        sample: the scan.
        window: sides of the result, in voxels; beyond the scan is its least value, as one_window() pads.
        rng: what is drawn.
    """
    image, mask = sample.image, sample.mask
    zoom = float(np.exp(rng.uniform(-ZOOM, ZOOM)))
    offsets, inside = [], []
    for axis, (side, wide) in enumerate(zip(image.shape, window, strict=True)):
        filled = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
        first, end = filled[0] * zoom, (filled[-1] + 1) * zoom  # of the structure, zoomed
        offset = rng.uniform(*sorted((0.0, wide - side * zoom)))
        offset = float(np.clip(offset, -first, wide - end)) if end - first <= wide else (wide - first - end) / 2
        offsets.append(offset)
        cut = rng.uniform(0, 1, 2) * (rng.random() < 0.5)  # shares of what lies before and after the structure
        low, high = offset + cut[0] * first, offset + side * zoom - cut[1] * (side * zoom - end)
        inside.append(np.logical_and(np.arange(wide) >= round(low), np.arange(wide) < round(high)))
    # Voxel o of the window shows the scan's (o + 1/2 - offset) / zoom - 1/2.
    matrix, start = np.full(3, 1 / zoom), [(0.5 - offset) / zoom - 0.5 for offset in offsets]
    shown = ndimage.affine_transform(image, matrix, start, tuple(window), order=1, mode="nearest")
    spread, is_seen = float(image.std()), inside[0][:, None, None] & inside[1][:, None] & inside[2]
    shown = shown * (1 + rng.uniform(-GAIN, GAIN)) + rng.uniform(-OFFSET, OFFSET) * spread
    shown = shown + rng.normal(0, NOISE * rng.random() * spread + 1e-8, shown.shape)
    shown[~is_seen] = shown[is_seen].min()
    labels = ndimage.affine_transform(mask, matrix, start, tuple(window), order=0, cval=0) * is_seen
    return Sample(shown.astype(np.float32), labels.astype(np.uint8))


def _batch(
    samples: Sequence[Sample], window: Sequence[int], rng: np.random.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, *window) and masks (N, *window) on the device."""
    drawn = [augmented(sample, window, rng) for sample in samples]
    images = torch.from_numpy(np.stack([sample.image for sample in drawn]))[:, None]  # (N, 1, *window)
    return images.to(device), torch.from_numpy(np.stack([sample.mask for sample in drawn])).to(device)
