"""Pseudo-labels: the teacher's decision, cleaned to the largest connected component."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Literal

import cc3d
import numpy as np
import torch
from torch import Tensor

from sdcl.losses import class_map

Rule = Literal["threshold", "argmax"]
CONNECTIVITIES = {2: (4, 8), 3: (6, 18, 26)}


def decide(probabilities: Tensor, rule: Rule) -> Tensor:
    """Turn probabilities (N, C, *S) into label maps (N, *S), uint8, of more than 256 classes int32.

    Args:
        probabilities: softmax output.
        rule: "threshold": class 1 where its probability is at least 0.5, for two classes only; "argmax".

    Raises:
        ValueError: "threshold" with another number of classes than two, or an unknown rule.
    """
    if rule == "argmax":
        return class_map(probabilities)
    if rule != "threshold":
        raise ValueError(f"unknown rule {rule!r}: choose 'threshold' or 'argmax'")
    if probabilities.shape[1] != 2:
        raise ValueError(f"the rule 'threshold' needs two classes, not {probabilities.shape[1]}: choose 'argmax'")
    return (probabilities[:, 1] >= 0.5).to(torch.uint8)


def largest_components(labels: np.ndarray, connectivity: int) -> np.ndarray:
    """Keep the largest connected component of each foreground class of one label map; the rest becomes 0.

    Args:
        labels: (*S) of two or three dimensions, uint8.
        connectivity: number of neighbours: 4 or 8 in 2D; 6, 18 or 26 in 3D.

    Returns:
        Label map of the same shape and dtype. Of two components of the same size the one met first in raster (C)
        order is kept; a class that is absent stays absent.

    Raises:
        ValueError: the connectivity does not exist in that dimension.
    """
    if connectivity not in CONNECTIVITIES.get(labels.ndim, ()):
        raise ValueError(f"connectivity {connectivity} is not one of {CONNECTIVITIES} (by number of dimensions)")
    components = cc3d.connected_components(np.ascontiguousarray(labels), connectivity=connectivity).ravel()
    foreground = np.flatnonzero(labels != 0)  # a small part of most images: all the rest looks at it alone
    members = components.take(foreground)
    sizes = np.bincount(members, minlength=1)
    class_of = np.zeros(len(sizes), labels.dtype)
    class_of[members] = labels.take(foreground)
    keep = np.zeros_like(class_of)
    for c in set(class_of.tolist()) - {0}:
        candidates = np.flatnonzero(class_of == c)
        largest = candidates[sizes[candidates] == sizes[candidates].max()]
        first = members[np.isin(members, largest)][0] if len(largest) > 1 else largest[0]
        keep[first] = c
    result = np.zeros_like(labels, order="C")
    result.ravel()[foreground] = keep.take(members)
    return result


class PendingLabels:
    """Pseudo-labels that threads of the host clean while the caller goes on; the device is not waited for.

    Only the losses need them, so the students' forward passes can run meanwhile.

    Args:
        logits: (N, C, *S), any float dtype, any device.
        rule: see decide().
        connectivity: see largest_components(); LA 26, Pancreas 18, ACDC 8; None: nothing is cleaned away.

    Raises:
        ValueError: see decide().
    """

    def __init__(self, logits: Tensor, rule: Rule, connectivity: int | None):
        decision = decide(torch.softmax(logits.detach().float(), dim=1), rule)
        self._device, self._copied = decision.device, None
        if decision.is_cuda:
            with torch.cuda.device(self._device):  # the event is of this GPU's stream, whichever is the current one
                self._labels = torch.empty(decision.shape, dtype=decision.dtype, pin_memory=True)
                self._labels.copy_(decision, non_blocking=True)
                self._copied = torch.cuda.Event()
                self._copied.record()
        else:
            self._labels = decision if decision.device.type == "cpu" else decision.cpu()
        samples = [] if connectivity is None else self._labels
        self._work = [_cleaners(os.getpid()).submit(self._clean, sample, connectivity) for sample in samples]

    def _clean(self, sample: Tensor, connectivity: int) -> None:
        if self._copied is not None:
            with torch.cuda.device(self._device):  # a new thread's current GPU is the first one
                self._copied.synchronize()  # this thread waits for the teacher, the caller does not
        labels = sample.numpy()
        labels[...] = largest_components(labels, connectivity)

    def result(self) -> Tensor:
        """Wait for the cleaning and return the labels.

        Returns:
            uint8 (of more than 256 classes int32) tensor (N, *S) on the logits' device, without gradient.

        Raises:
            ValueError: see largest_components().
        """
        for work in self._work:
            work.result()
        return self._labels.to(self._device, non_blocking=True)


@cache
def _cleaners(process: int) -> ThreadPoolExecutor:
    """Return the threads of a process; those of its parent do not run in a forked one, which would wait for ever."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="pseudo_labels")


def pseudo_label(logits: Tensor, rule: Rule, connectivity: int) -> Tensor:
    """Decide each voxel's class and keep each foreground class's largest component, sample by sample.

    Args:
        logits: (N, C, *S), any float dtype, any device.
        rule: see decide().
        connectivity: see largest_components(); LA 26, Pancreas 18, ACDC 8.

    Returns:
        uint8 (of more than 256 classes int32) tensor (N, *S) on the logits' device, without gradient.

    Raises:
        ValueError: see decide() and largest_components().

    Source: docs/method.md, "Pseudo-labels".
    """
    return PendingLabels(logits, rule, connectivity).result()
