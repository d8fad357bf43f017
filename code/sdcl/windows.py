"""The windows that cover a volume: where they begin, what they weigh, and which of them show one value throughout."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Weighting = Literal["constant", "gaussian"]
GAUSSIAN_SIGMA = 1 / 8  # of the window's side
Place = tuple[int, int, int]  # of a window's first voxel
KEPT_VALUES = 8  # of which a window's outputs are kept: air and padding are one or two; masks may have many


@dataclass(frozen=True)
class Windows:
    """How a volume is predicted window by window; see sliding_window().

    Attributes:
        patch_size: the window's sides, in voxels.
        stride: between windows, in voxels.
        num_classes: number of classes C.
        batch_size: windows that go through the networks together.
        precision: "fp32", "tf32" or "bf16".
        weighting: "constant" or "gaussian".
        tta: average over the eight flips of each window.
        skip_air: compute windows of one value throughout, as air is when it is clipped, once a value.
        on_done: told after each batch how many windows it had, and how many of them were not computed.
    """

    patch_size: Sequence[int]
    stride: Sequence[int]
    num_classes: int
    batch_size: int = 4
    precision: str = "fp32"
    weighting: Weighting = "constant"
    tta: bool = False
    skip_air: bool = False
    on_done: Callable[[int, int], None] | None = None


def window_starts(side: int, patch: int, stride: int) -> list[int]:
    """Return where the windows begin on one axis: ceil((side - patch) / stride) + 1 places, the last shifted to fit."""
    count = math.ceil((side - patch) / stride) + 1
    return [min(stride * i, side - patch) for i in range(count)]


def evenly(places: list[Place], most: int) -> list[list[Place]]:
    """Cut places into as few groups as hold at most so many, of sizes as equal as can be.

    None is left over alone (but by twos): a CPU rounds a batch of one window otherwise than larger ones.
    """
    count = math.ceil(len(places) / most)
    ends = [len(places) * k // count for k in range(count + 1)]
    return [places[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def window_profile(patch: int, weighting: Weighting) -> Tensor:
    """Return a window's weight along one axis (patch,); a window's weight is the product over its axes."""
    if weighting == "constant":
        return torch.ones(patch)
    offset = torch.arange(patch) - (patch - 1) / 2
    return torch.exp(-0.5 * (offset / (GAUSSIAN_SIGMA * patch)) ** 2).clamp_min(1e-3)


def axis_weight(side: int, starts: Sequence[int], profile: Tensor) -> Tensor:
    """Sum the windows' profiles along one axis."""
    weight = torch.zeros(side)
    for start in starts:
        weight[start : start + len(profile)] += profile
    return weight


def cut(array: Any, start: Sequence[int], sides: Sequence[int]) -> Any:
    """Return the part of an array or tensor that begins at an index and has these sides."""
    return array[tuple(slice(a, a + n) for a, n in zip(start, sides, strict=True))]


def only_value(volume: np.ndarray, start: Sequence[int], sides: Sequence[int]) -> tuple[float, ...] | None:
    """Return the one value of each channel (channels, *S) within a window, or None where a channel has several."""
    part = cut(volume, (0, *start), (len(volume), *sides))
    first = part[:, :1, :1, :1]
    # A line through its middle settles most windows, so that the others' voxels need not all be looked at.
    middle = part[:, sides[0] // 2, sides[1] // 2]
    if (middle != first[:, 0, 0]).any() or (part != first).any():
        return None
    return tuple(first.ravel().tolist())


class SameContent:
    """Keeps what a network finds in windows of one value throughout, since a window's content decides it.

    Args:
        volume: (channels, *S), whose windows are computed.
        patch: the window's sides.
        enabled: False takes every window for one of its own.
    """

    def __init__(self, volume: np.ndarray, patch: Sequence[int], enabled: bool):
        self._volume, self._patch, self._enabled = volume, patch, enabled
        self._kept: dict[tuple[float, ...], Tensor] = {}

    def outputs(
        self, places: Sequence[Place], compute: Callable[[Sequence[Place]], list[Tensor]]
    ) -> tuple[list[Tensor], int]:
        """Return what the network finds in the windows at some places, and how many of them were computed.

        Args:
            places: where the windows begin.
            compute: returns the outputs of windows, (C, *patch) of each.
        """
        values = [only_value(self._volume, place, self._patch) if self._enabled else None for place in places]
        news = list(dict.fromkeys(v for v in values if v is not None and v not in self._kept))
        keeps = {*self._kept, *news[: KEPT_VALUES - len(self._kept)]}
        values = [v if v in keeps else None for v in values]
        chosen = [k for k, v in enumerate(values) if v is None or (v not in self._kept and v not in values[:k])]
        # A CPU rounds a batch of one window otherwise than larger ones: the only one left of several goes twice.
        repeats = 2 if len(chosen) == 1 < len(places) else 1
        computed = compute([places[k] for k in chosen * repeats]) if chosen else []
        found = dict(zip(chosen, computed, strict=False))
        for k, output in found.items():
            if values[k] is not None:
                self._kept[values[k]] = output.clone()
        return [found[k] if k in found else self._kept[v] for k, v in enumerate(values)], len(chosen)
