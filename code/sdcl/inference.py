"""From a volume to each network's class probabilities: slice by slice, or window by window."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import combinations, product

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from sdcl.windows import Place, SameContent, Weighting, Windows, axis_weight, cut, evenly, window_profile, window_starts

# Some planes of a volume (a slice with start and stop), and what each network finds there, float32 (C, planes, ...).
Slabs = Iterable[tuple[slice, list[np.ndarray]]]
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


@contextlib.contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[nn.Module]:
    """Put a network into eval mode while the block runs; each of its modules gets its own mode back."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield network
    finally:
        for module, is_training in modes:
            module.training = is_training


def predict(networks: Sequence[nn.Module], images: Tensor, precision: str = "fp32") -> list[Tensor]:
    """Run networks in eval mode without gradient; afterwards they are in the mode that they were in.

    Args:
        networks: each maps (N, channels, *S) to logits (N, C, *S).
        images: (N, channels, *S) float32, on the networks' device.
        precision: "fp32", "tf32" (set_arithmetic() says what it does) or "bf16".

    Returns:
        Each network's probabilities, float32 (N, C, *S), on the device.
    """
    with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        found = []
        for network in networks:
            with in_eval_mode(network):
                found.append(torch.softmax(network(images).float(), dim=1))
        return found


def mean_of(outputs: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean of arrays of one shape, with no more memory than its own; of one array that array itself."""
    if len(outputs) == 1:
        return outputs[0]
    total = outputs[0] + outputs[1]
    for other in outputs[2:]:
        total += other
    total /= len(outputs)
    return total


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
    return put_together(slice_slabs(networks, volume, size, num_classes, batch_size, precision), volume.shape[-3:])


def slice_slabs(
    networks: Sequence[nn.Module],
    volume: np.ndarray,
    size: Sequence[int],
    num_classes: int,
    batch_size: int = 16,
    precision: str = "fp32",
) -> Slabs:
    """Do what slice_wise() does, some slices at a time: yield them, as first and end, and each network's probabilities.

    Yields:
        A slice of the first axis, and for each network float32 (C, slices, H, W).
    """
    depth, height, width = volume.shape[-3:]
    channels = _with_channels(volume)
    background = np.eye(num_classes, dtype=np.float32)[0, :, None, None]
    for start in range(0, depth, batch_size):
        zoomed = nearest_zoom(channels[:, start : start + batch_size], size).swapaxes(0, 1)  # (n, channels, H', W')
        images = torch.from_numpy(np.ascontiguousarray(zoomed)).to(device_of(networks))
        backs = [
            nearest_zoom(p.cpu().numpy(), (height, width), background) for p in predict(networks, images, precision)
        ]
        yield slice(start, start + len(images)), [back.swapaxes(0, 1) for back in backs]


def put_together(slabs: Slabs, shape: Sequence[int]) -> list[np.ndarray]:
    """Return what slabs hold as whole volumes.

    Args:
        slabs: from slice_slabs() or window_slabs().
        shape: S of the volume.

    Returns:
        For each network its probabilities, float32 (C, *S).
    """
    results: list[np.ndarray] = []
    for where, outputs in slabs:
        results = results or [np.empty((len(one), *shape), np.float32) for one in outputs]
        for result, one in zip(results, outputs, strict=True):
            result[:, where] = one
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
    windows = Windows(patch_size, stride, num_classes, batch_size, precision, weighting, tta)
    return put_together(window_slabs(networks, volume, windows), volume.shape[volume.ndim == 4 :])


def window_slabs(networks: Sequence[nn.Module], volume: np.ndarray, how: Windows) -> Slabs:
    """Do what sliding_window() does, and yield the planes across the first axis that no further window reaches.

    Windows are summed in float32 on the networks' device, over as many planes as they reach: beside the volume, memory
    holds for each network the C sums of a window's planes, however long the volume is.

    Yields:
        A slice of the first axis, and for each network its probabilities there, float32 (C, planes, Y, Z): the sums'
        own memory, which the next windows use again once the next slab is asked for.

    Raises:
        ValueError: see sliding_window().
    """
    shape, patch = volume.shape[volume.ndim == 4 :], tuple(how.patch_size)
    if not len(shape) == len(patch) == len(how.stride) == 3:
        raise ValueError(f"volume {volume.shape}, patch {patch} and stride {how.stride} need three sides each")
    if any(not 1 <= step <= side for step, side in zip(how.stride, patch, strict=True)):
        raise ValueError(f"stride {how.stride} must lie between 1 and the patch {patch}, or windows leave gaps")
    pads = [max(patch_side - side, 0) for side, patch_side in zip(shape, patch, strict=True)]
    padded = _with_channels(volume)
    if any(pads):
        padded = np.pad(padded, [(0, 0), *((pad // 2, pad - pad // 2) for pad in pads)])
    starts = [window_starts(*axis) for axis in zip(padded.shape[1:], patch, how.stride, strict=True)]
    profiles = [window_profile(side, how.weighting) for side in patch]
    # The grid is a product, so the weights' sum over windows is one too.
    norms = [axis_weight(*axis).numpy() for axis in zip(padded.shape[1:], starts, profiles, strict=True)]
    across = np.multiply.outer(norms[1], norms[2])
    inside = [slice(pad // 2, pad // 2 + side) for pad, side in zip(pads, shape, strict=True)]
    for first, sums in _summed(networks, padded, starts, profiles, how):
        ready = []
        for total in sums:
            for k, planes in enumerate(total.swapaxes(0, 1)):
                planes /= norms[0][first + k] * across
            begin, end = max(inside[0].start - first, 0), inside[0].stop - first
            ready.append(total[:, begin:end, inside[1], inside[2]])
        start = max(first, inside[0].start) - inside[0].start
        if ready[0].shape[1]:
            yield slice(start, start + ready[0].shape[1]), ready
        del sums, ready, total, planes  # from a GPU a copy, as large as a window's planes: not kept meanwhile


def _summed(
    networks: Sequence[nn.Module],
    padded: np.ndarray,
    starts: Sequence[Sequence[int]],
    profiles: Sequence[Tensor],
    how: Windows,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yield the windows' weighted sums, (C, planes, Y, Z) for each network, with the first plane's number."""
    device, patch = device_of(networks), tuple(how.patch_size)
    weight = torch.einsum("i,j,k->ijk", *profiles).to(device)
    run = predict_flipped if how.tta else predict
    sums = [torch.zeros(how.num_classes, patch[0], *padded.shape[2:], device=device) for _ in networks]
    sames = [SameContent(padded, patch, how.skip_air) for _ in networks]
    base = 0
    for x in starts[0]:
        if x > base:  # no further window reaches the planes before it
            yield base, [total[:, : x - base].cpu().numpy() for total in sums]
            _move_on(sums, x - base)
            base = x
        region = torch.from_numpy(padded[:, x : x + patch[0]]).to(device)  # at once: windows are cut on the device

        def compute(network: nn.Module, chosen: Sequence[Place], region: Tensor = region) -> list[Tensor]:
            windows = torch.stack([cut(region, (0, 0, y, z), (len(padded), *patch)) for _, y, z in chosen])
            with torch.inference_mode():
                return list(run([network], windows, how.precision)[0].mul_(weight))

        for group in evenly(list(product([x], *starts[1:])), how.batch_size):
            # One network after the other, whose outputs are not kept while the next one computes.
            for network, total, same in zip(networks, sums, sames, strict=True):
                found, computed = same.outputs(group, partial(compute, network))
                for (_, y, z), output in zip(group, found, strict=True):
                    cut(total, (0, 0, y, z), (how.num_classes, *patch)).add_(output)
                del found, output
            if how.on_done is not None:
                how.on_done(len(group), len(group) - computed)
    yield base, [total.cpu().numpy() for total in sums]


def _move_on(sums: Sequence[Tensor], planes: int) -> None:
    """Shift sums (C, planes, Y, Z) by some planes, channel by channel, since each is copied."""
    for channel in (channel for total in sums for channel in total):
        kept = channel[planes:].clone()
        channel[: len(kept)] = kept
        channel[len(kept) :] = 0


def _with_channels(volume: np.ndarray) -> np.ndarray:
    """Return a volume (X, Y, Z) or (channels, X, Y, Z) as float32 (channels, X, Y, Z)."""
    volume = volume.astype(np.float32, copy=False)
    return volume if volume.ndim == 4 else volume[None]
