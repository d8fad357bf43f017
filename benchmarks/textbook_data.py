"""Reading and predicting as a textbook writes it: a file for each sample, scipy for each image, a pass a predictor."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import h5py
import numpy as np
import torch
from medpy.metric import binary
from scipy import ndimage
from torch import nn

from sdcl.inference import window_starts


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read image and label (*S) of one HDF5 file."""
    with h5py.File(path, "r") as file:
        return file["image"][:], file["label"][:]


def augmented_slice(path: Path, size: Sequence[int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Read a slice and augment it: image and label (H, W)."""
    pair = read(path)
    if rng.random() < 0.5:
        quarters, axis = rng.integers(4), rng.integers(2)
        pair = [np.flip(np.rot90(array, quarters), axis) for array in pair]
    elif rng.random() < 0.5:
        angle = int(rng.integers(-20, 20))
        pair = [ndimage.rotate(array, angle, order=0, reshape=False) for array in pair]
    factors = [out / side for out, side in zip(size, pair[0].shape, strict=True)]
    image, label = (ndimage.zoom(array, factors, order=0) for array in pair)
    return image, label


def random_crop(path: Path, patch: Sequence[int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Read a volume and crop it: image and label (X, Y, Z)."""
    image, label = read(path)
    if any(side <= p for side, p in zip(image.shape, patch, strict=True)):
        pads = [(max((p - side) // 2 + 1, 0),) * 2 for side, p in zip(image.shape, patch, strict=True)]
        image, label = np.pad(image, pads), np.pad(label, pads)
    corner = [int(rng.integers(side - p)) for side, p in zip(image.shape, patch, strict=True)]
    box = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
    return image[box], label[box]


def predict(networks: Sequence[nn.Module], images: np.ndarray) -> np.ndarray:
    """Return the mean of the networks' probabilities (N, C, *S) for images (N, 1, *S)."""
    device = next(networks[0].parameters()).device
    with torch.no_grad():
        x = torch.from_numpy(images).to(device)
        return np.mean([torch.softmax(network.eval()(x), 1).cpu().numpy() for network in networks], axis=0)


def sliding_window(
    networks: Sequence[nn.Module], volume: np.ndarray, patch: Sequence[int], stride: Sequence[int], num_classes: int
) -> np.ndarray:
    """Return the probabilities (C, X, Y, Z) of one predictor, a window at a time; no side is below the patch's."""
    total, count = np.zeros((num_classes, *volume.shape), np.float32), np.zeros(volume.shape, np.float32)
    for place in product(*(window_starts(*axis) for axis in zip(volume.shape, patch, stride, strict=True))):
        box = tuple(slice(a, a + p) for a, p in zip(place, patch, strict=True))
        total[(slice(None), *box)] += predict(networks, volume[box][None, None])[0]
        count[box] += 1
    return total / count


def slice_wise(networks: Sequence[nn.Module], volume: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Return the label map (D, H, W) of one predictor, a slice at a time."""
    labels = np.zeros(volume.shape, np.uint8)
    for image, label in zip(volume, labels, strict=True):
        factors = [out / side for out, side in zip(size, image.shape, strict=True)]
        decision = predict(networks, ndimage.zoom(image, factors, order=0)[None, None])[0].argmax(0)
        label[:] = ndimage.zoom(decision, [1 / factor for factor in factors], order=0)
    return labels


def case_metrics(prediction: np.ndarray, reference: np.ndarray) -> tuple[float, float, float, float]:
    """Return Dice, Jaccard, 95HD and ASD of two binary masks by MedPy, on the whole volume."""
    return tuple(float(f(prediction, reference)) for f in (binary.dc, binary.jc, binary.hd95, binary.asd))
