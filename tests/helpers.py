"""Shared by the tests: the golden figures' folder, deterministic weights, a method's settings, tiny data."""

import zlib
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import torch

from dataloaders.scans.prediction import prepared_for, segmented

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).resolve().parents[1]


def segment(channels, how, infer, networks, *given):
    """Return the probabilities (C, X, Y, Z) of a scan on its own grid; see prepared_for() and segmented()."""
    whole = None
    for where, placed in segmented(prepared_for(channels, how, *given), channels[0], infer, networks):
        if whole is None:
            whole = np.zeros((len(placed), *channels[0].array.shape), np.float32)
            whole[0] = 1
        whole[(slice(None), *where)] = placed
    return whole


def in_slabs(infer, planes=2):
    """Return what yields, some planes at a time, what infer(networks, volume) finds in a whole volume."""

    def slabs(networks, volume):
        outputs = infer(networks, volume)
        for first in range(0, outputs[0].shape[1], planes):
            yield slice(first, first + planes), [p[:, first : first + planes] for p in outputs]

    return slabs


def fill(network, seed):
    """Give a network the golden figures' weights: each drawn from a generator seeded by its name."""
    state = {}
    for name, old in network.state_dict().items():
        rng, shape = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**31), tuple(old.shape)
        if name.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif name.endswith("running_mean"):
            value = 0.1 * rng.standard_normal(shape)
        elif name.endswith("running_var"):
            value = 1 + 0.2 * rng.rand(*shape)
        elif len(shape) > 1:
            value = rng.standard_normal(shape) * np.sqrt(2.0 / np.prod(shape[1:]))
        elif name.endswith("weight"):
            value = 1 + 0.1 * rng.standard_normal(shape)
        else:
            value = 0.05 * rng.standard_normal(shape)
        state[name] = torch.from_numpy(np.asarray(value, np.float32)).reshape(shape).to(old.dtype)
    network.load_state_dict(state)
    return network


def method(**changes):
    """Return ACDC's settings, those that the loops read, with changes."""
    settings = {
        "method": "sdcl", "seed": 1, "precision": "fp32", "compile": False, "cuda_graphs": True,
        "pre_iterations": 4, "self_iterations": 4, "mask_fraction": 2 / 3,
        "pre_dice": "regions", "dice": "batch", "u_weight": 0.5, "mse_weight": 0.5, "kl_weight": 0.05,
        "correct": "discrepancy", "pseudo_label_rule": "argmax", "largest_component": "yes", "connectivity": 8,
        "teacher_dropout": "yes", "consistency_weight": 0.1, "rampup": None, "noise": 0.1, "passes": 8, "paste": "yes",
        "ema_decay": 0.99, "ema_buffers": True, "ema_warmup": False, "average_decay": 0.0, "dropout": 1.0,
        "lr_schedule": "constant", "warmup": 0, "log_every": 2, "save_every": 2, "save_minutes": 0,
    }  # fmt: skip
    return SimpleNamespace(**(settings | changes))


def strided(array, count):
    """Return `count` values of an array, evenly strided, as the golden figures keep them."""
    flat = np.asarray(array).ravel()
    return flat[:: max(1, flat.size // count)][:count]


def write_h5(path, **datasets):
    """Write an HDF5 file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, value in datasets.items():
            file[key] = value
    return path
