"""Pseudo-labels: the teacher's decision, cleaned to the largest connected component."""

from typing import Literal

import cc3d
import numpy as np
import torch
from torch import Tensor

from sdcl.losses import class_map

Rule = Literal["threshold", "argmax"]
CONNECTIVITIES = {2: (4, 8), 3: (6, 18, 26)}


def decide(probabilities: Tensor, rule: Rule) -> Tensor:
    """Turn probabilities (N, C, *S) into label maps (N, *S), uint8.

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
    components = cc3d.connected_components(np.ascontiguousarray(labels), connectivity=connectivity)
    sizes = np.bincount(components.ravel())
    class_of = np.zeros(len(sizes), labels.dtype)
    class_of[components.ravel()] = labels.ravel()
    keep = np.zeros_like(class_of)
    for c in np.unique(class_of[1:]):
        members = np.flatnonzero(class_of == c)
        largest = members[sizes[members] == sizes[members].max()]
        if len(largest) > 1:
            first = np.flatnonzero(np.isin(components.ravel(), largest))[0]
            largest = components.ravel()[first : first + 1]
        keep[largest[0]] = c
    return keep[components]


def pseudo_label(logits: Tensor, rule: Rule, connectivity: int) -> Tensor:
    """Decide each voxel's class and keep each foreground class's largest component, sample by sample.

    Args:
        logits: (N, C, *S), any float dtype, any device.
        rule: see decide().
        connectivity: see largest_components(); LA 26, Pancreas 18, ACDC 8.

    Returns:
        uint8 tensor (N, *S) on the logits' device, without gradient.

    Raises:
        ValueError: see decide() and largest_components().

    Source: docs/method.md, "Pseudo-labels".
    """
    decision = decide(torch.softmax(logits.detach().float(), dim=1), rule)
    cleaned = [largest_components(sample, connectivity) for sample in decision.cpu().numpy()]
    return torch.from_numpy(np.stack(cleaned)).to(logits.device)
