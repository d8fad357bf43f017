"""From a volume to each network's class probabilities: slice by slice, or window by window."""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations, product
from typing import Any, Literal

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

Weighting = Literal["constant", "gaussian"]
GAUSSIAN_SIGMA = 1 / 8  # of the window's side
BLOCK_SIDE = 256  # voxels; an LA or Pancreas volume is one block
HALVINGS = 4  # of every network
LEAST_BOTTOM = 4  # voxels at the networks' deepest stage, whose norms need several


@lru_cache(maxsize=1024)
def zoom_index(side: int, size: int) -> np.ndarray:
    """Return which of `side` positions each of `size` shows under scipy.ndimage.zoom of order 0; -1 for none.

    Asking scipy to zoom the positions themselves makes the same choice at ties, and at the far end, where for some
    sizes its rounding falls beyond the image, as zooming the image would.
    """
    return ndimage.zoom(np.arange(1, side + 1), size / side, order=0) - 1


def nearest_zoom(array: np.ndarray, size: Sequence[int], fill: float | np.ndarray = 0) -> np.ndarray:
    """Zoom the last two axes to a size: the same values as scipy.ndimage.zoom of order 0.

    Args:
        array: (..., H, W) of any dtype.
        size: (H', W').
        fill: value of pixels that scipy finds beyond the image.

    Returns:
        (..., H', W') of the same dtype.
    """
    rows, columns = (zoom_index(side, out) for side, out in zip(array.shape[-2:], size, strict=True))
    zoomed = array[..., rows[:, None], columns]
    zoomed[..., rows < 0, :] = fill
    zoomed[..., :, columns < 0] = fill
    return zoomed


def predict(networks: Sequence[nn.Module], images: Tensor, precision: str = "fp32") -> list[Tensor]:
    """Run networks in eval mode without gradient.

    Args:
        networks: each maps (N, channels, *S) to logits (N, C, *S).
        images: (N, channels, *S) float32, on the networks' device.
        precision: "fp32", "tf32" (set_arithmetic() says what it does) or "bf16".

    Returns:
        Each network's probabilities, float32 (N, C, *S), on the device.
    """
    with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return [torch.softmax(network.eval()(images).float(), dim=1) for network in networks]


def device_of(networks: Sequence[nn.Module]) -> torch.device:
    """Return the device that the networks are on."""
    return next(networks[0].parameters()).device


def slice_wise(
    networks: Sequence[nn.Module],
    volume: np.ndarray,
    size: Sequence[int],
    num_classes: int,
    batch_size: int = 16,
    precision: str = "fp32",
) -> list[np.ndarray]:
    """Predict a volume slice by slice with 2D networks; one reading of the volume serves all of them.

    Args:
        networks: 2D networks on one device.
        volume: (D, H, W), or (channels, D, H, W) of several, float32.
        size: (H', W') that the networks get, in pixels.
        num_classes: number of classes C.
        batch_size: slices that go through the networks together.
        precision: "fp32", "tf32" (set_arithmetic() says what it does) or "bf16".

    Returns:
        For each network its probabilities, float32 (C, D, H, W).

    Source: docs/method.md, "Schedule, selection, test", ACDC: order-0 zoom to the size and back.
    """
    depth, height, width = volume.shape[-3:]
    zoomed = nearest_zoom(_with_channels(volume), size).swapaxes(0, 1)  # (D, channels, H', W')
    background = np.eye(num_classes, dtype=np.float32)[0, :, None, None]
    results = [np.empty((num_classes, depth, height, width), np.float32) for _ in networks]
    for start in range(0, depth, batch_size):
        images = torch.from_numpy(np.ascontiguousarray(zoomed[start : start + batch_size])).to(device_of(networks))
        for result, probabilities in zip(results, predict(networks, images, precision), strict=True):
            back = nearest_zoom(probabilities.cpu().numpy(), (height, width), background)  # (n, C, H, W)
            result[:, start : start + len(back)] = back.swapaxes(0, 1)
    return results


def whole_window(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the sides of the smallest window that holds a volume and that networks can take, in voxels."""
    unit = 2**HALVINGS
    sides = [unit * math.ceil(side / unit) for side in shape]
    while math.prod(side // unit for side in sides) < LEAST_BOTTOM:
        sides[sides.index(min(sides))] += unit
    return tuple(sides)


def one_window(network: nn.Module, volume: np.ndarray, precision: str = "fp32") -> np.ndarray:
    """Predict a small volume at once: padded with its least value to whole_window(), and cropped back.

    Args:
        network: a 3D network.
        volume: (X, Y, Z), float32.
        precision: see predict().

    Returns:
        The probabilities, float32 (C, X, Y, Z).
    """
    pads = [a - b for a, b in zip(whole_window(volume.shape), volume.shape, strict=True)]
    padded = np.pad(volume, [(pad // 2, pad - pad // 2) for pad in pads], constant_values=volume.min())
    image = torch.from_numpy(padded.astype(np.float32, copy=False))[None, None].to(device_of([network]))
    found = predict([network], image, precision)[0][0].cpu().numpy()  # (C, *padded)
    inside = tuple(slice(pad // 2, pad // 2 + side) for pad, side in zip(pads, volume.shape, strict=True))
    return np.ascontiguousarray(found[(slice(None), *inside)])


def window_starts(side: int, patch: int, stride: int) -> list[int]:
    """Return where the windows begin on one axis: ceil((side - patch) / stride) + 1 places, the last shifted to fit."""
    count = math.ceil((side - patch) / stride) + 1
    return [min(stride * i, side - patch) for i in range(count)]


def window_profile(patch: int, weighting: Weighting) -> Tensor:
    """Return a window's weight along one axis (patch,); a window's weight is the product over its axes."""
    if weighting == "constant":
        return torch.ones(patch)
    offset = torch.arange(patch) - (patch - 1) / 2
    return torch.exp(-0.5 * (offset / (GAUSSIAN_SIGMA * patch)) ** 2).clamp_min(1e-3)


def predict_flipped(networks: Sequence[nn.Module], images: Tensor, precision: str) -> list[Tensor]:
    """Average each network's probabilities over all flips of the spatial axes; see predict()."""
    axes = range(2, images.ndim)
    flips = [flip for count in range(images.ndim - 1) for flip in combinations(axes, count)]
    sums: list[Tensor] = []
    for flip in flips:
        flipped = [p.flip(flip) for p in predict(networks, images.flip(flip), precision)]
        sums = [total + p for total, p in zip(sums, flipped, strict=True)] if sums else flipped
    return [total / len(flips) for total in sums]


def sliding_window(
    networks: Sequence[nn.Module],
    volume: np.ndarray,
    patch_size: Sequence[int],
    stride: Sequence[int],
    num_classes: int,
    batch_size: int = 4,
    precision: str = "fp32",
    weighting: Weighting = "constant",
    tta: bool = False,
) -> list[np.ndarray]:
    """Predict a volume window by window with 3D networks; one pass over the windows serves all of them.

    The windows are summed in float32 on the networks' device, a block of them at a time, and the blocks on the host. So
    the device holds the block's voxels and for each network at most C * BLOCK_SIDE**3 sums (a window's, where that is
    larger), whatever the volume's size; the host holds the results and one padded copy of the volume.

    Args:
        networks: 3D networks on one device.
        volume: (X, Y, Z), or (channels, X, Y, Z) of several; padded with zeros to at least the patch, and cropped back.
        patch_size: the window's sides, in voxels.
        stride: between windows, in voxels; at most the patch.
        num_classes: number of classes C.
        batch_size: windows that go through the networks together.
        precision: "fp32", "tf32" (set_arithmetic() says what it does) or "bf16".
        weighting: "constant", as published, or "gaussian", which trusts a window's centre more.
        tta: average over the eight flips of each window.

    Returns:
        For each network its probabilities, float32 (C, X, Y, Z).

    Raises:
        ValueError: the volume is not three-dimensional, or the strides do not fit the patch.

    Source: docs/method.md, "Schedule, selection, test", sliding window.
    """
    shape = volume.shape[volume.ndim == 4 :]
    if not len(shape) == len(patch_size) == len(stride) == 3:
        raise ValueError(f"volume {volume.shape}, patch {patch_size} and stride {stride} need three sides each")
    if any(not 1 <= step <= patch for step, patch in zip(stride, patch_size, strict=True)):
        raise ValueError(f"stride {stride} must lie between 1 and the patch {patch_size}, or windows leave gaps")
    pads = [max(patch - side, 0) for side, patch in zip(shape, patch_size, strict=True)]
    padded = np.pad(_with_channels(volume), [(0, 0), *((pad // 2, pad - pad // 2) for pad in pads)])
    device = device_of(networks)
    image, channels, padded_shape = torch.from_numpy(padded), len(padded), padded.shape[1:]
    starts = [window_starts(*axis) for axis in zip(padded_shape, patch_size, stride, strict=True)]
    profiles = [window_profile(patch, weighting) for patch in patch_size]
    window_weight = torch.einsum("i,j,k->ijk", *profiles).to(device)
    run = predict_flipped if tta else predict
    results = [np.zeros((num_classes, *padded_shape), np.float32) for _ in networks]
    for block in product(*map(_blocks, starts, patch_size)):
        corner = [axis[0] for axis in block]
        sides = [axis[-1] - axis[0] + patch for axis, patch in zip(block, patch_size, strict=True)]
        sums = [torch.zeros(num_classes, *sides, device=device) for _ in networks]
        region = _window(image, (0, *corner), (channels, *sides)).to(device)  # at once: windows are cut on the device
        places = [tuple(a - b for a, b in zip(place, corner, strict=True)) for place in product(*block)]
        for first in range(0, len(places), batch_size):
            chosen = places[first : first + batch_size]
            windows = torch.stack([_window(region, (0, *place), (channels, *patch_size)) for place in chosen])
            for total, probabilities in zip(sums, run(networks, windows, precision), strict=True):
                for place, p in zip(chosen, probabilities, strict=True):
                    _window(total, (0, *place), (num_classes, *patch_size)).add_(p * window_weight)
        for total, result in zip(sums, results, strict=True):
            _window(result, (0, *corner), total.shape)[...] += total.cpu().numpy()
    norms = [_axis_weight(*axis).numpy() for axis in zip(padded_shape, starts, profiles, strict=True)]
    for result in results:  # the grid is a product, so the weights' sum over windows is one too
        for x, planes in enumerate(result.swapaxes(0, 1)):
            planes /= norms[0][x] * np.multiply.outer(norms[1], norms[2])
    inside = tuple(slice(pad // 2, pad // 2 + side) for pad, side in zip(pads, shape, strict=True))
    return [np.ascontiguousarray(result[(slice(None), *inside)]) for result in results]


def _with_channels(volume: np.ndarray) -> np.ndarray:
    """Return a volume (X, Y, Z) or (channels, X, Y, Z) as float32 (channels, X, Y, Z)."""
    volume = volume.astype(np.float32, copy=False)
    return volume if volume.ndim == 4 else volume[None]


def _blocks(starts: Sequence[int], patch: int) -> list[list[int]]:
    """Group the windows' starts along one axis so that the windows of a group span at most BLOCK_SIDE voxels."""
    groups: list[list[int]] = []
    for start in starts:
        if groups and start + patch - groups[-1][0] <= BLOCK_SIDE:
            groups[-1].append(start)
        else:
            groups.append([start])
    return groups


def _axis_weight(side: int, starts: Sequence[int], profile: Tensor) -> Tensor:
    """Sum the windows' profiles along one axis."""
    weight = torch.zeros(side)
    for start in starts:
        weight[start : start + len(profile)] += profile
    return weight


def _window(array: Any, start: Sequence[int], sides: Sequence[int]) -> Any:
    return array[tuple(slice(a, a + n) for a, n in zip(start, sides, strict=True))]
