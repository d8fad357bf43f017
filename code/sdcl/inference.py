"""From a volume to each network's class probabilities: slice by slice, or window by window."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn


@lru_cache(maxsize=1024)
def _zoom_index(side: int, size: int) -> np.ndarray:
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
    rows, columns = (_zoom_index(side, out) for side, out in zip(array.shape[-2:], size, strict=True))
    zoomed = array[..., rows[:, None], columns]
    zoomed[..., rows < 0, :] = fill
    zoomed[..., :, columns < 0] = fill
    return zoomed


def predict(networks: Sequence[nn.Module], images: Tensor, precision: str = "fp32") -> list[Tensor]:
    """Run networks in eval mode without gradient.

    Args:
        networks: each maps (N, 1, *S) to logits (N, C, *S).
        images: (N, 1, *S) float32, on the networks' device.
        precision: "fp32" or "bf16".

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
        volume: (D, H, W), float32.
        size: (H', W') that the networks get, in pixels.
        num_classes: number of classes C.
        batch_size: slices that go through the networks together.
        precision: "fp32" or "bf16".

    Returns:
        For each network its probabilities, float32 (C, D, H, W).

    Source: method.md, "Schedule, selection, test", ACDC: order-0 zoom to the size and back.
    """
    depth, height, width = volume.shape
    zoomed = nearest_zoom(volume.astype(np.float32, copy=False), size)  # (D, H', W')
    background = np.eye(num_classes, dtype=np.float32)[0, :, None, None]
    results = [np.empty((num_classes, depth, height, width), np.float32) for _ in networks]
    for start in range(0, depth, batch_size):
        images = torch.from_numpy(zoomed[start : start + batch_size, None]).to(device_of(networks))
        for result, probabilities in zip(results, predict(networks, images, precision), strict=True):
            back = nearest_zoom(probabilities.cpu().numpy(), (height, width), background)  # (n, C, H, W)
            result[:, start : start + len(back)] = back.swapaxes(0, 1)
    return results
