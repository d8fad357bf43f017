"""Copy-paste mixing: a random box of one image pasted into another (docs/method.md, "Notation" and "Stage 1")."""

from collections.abc import Sequence

import torch
from torch import Tensor


def box_size(shape: Sequence[int], fraction: float) -> tuple[int, ...]:
    """Return the mask box's sides, floor(fraction * side) for each side of shape.

    Raises:
        ValueError: a side of the box would be 0 or as long as the shape's.
    """
    # The small term keeps a float just under an integer (0.6666... * 96) from losing a voxel.
    box = tuple(int(side * fraction + 1e-9) for side in shape)
    if not all(0 < b < side for b, side in zip(box, shape, strict=True)):
        raise ValueError(f"a mask of {fraction} of {tuple(shape)} has the box {box}: choose a fraction inside (0, 1)")
    return box


def copy_paste_mask(
    shape: Sequence[int],
    box: Sequence[int],
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw the mask M: True outside a random box, False inside it.

    Args:
        shape: spatial shape S of the inputs, in voxels.
        box: the box's sides, each in [1, side).
        generator: source of randomness, on the CPU; torch's global one if None.
        device: where to; the draws are the same everywhere, and nothing of full size is copied.

    Returns:
        Bool tensor (*S) on the device. The box's corner is uniform over [0, side - box) on each axis.

    Raises:
        ValueError: the box has another dimension than the shape or does not leave room on an axis.

    Source: docs/method.md, "Stage 2": the upper end of the corner's range is excluded.
    """
    if len(shape) != len(box) or not all(0 < b < side for b, side in zip(box, shape, strict=False)):
        raise ValueError(f"the box {tuple(box)} must be smaller than the shape {tuple(shape)} on every axis")
    mask = torch.ones(tuple(shape), dtype=torch.bool, device=device)
    corner = [int(torch.randint(side - b, (), generator=generator)) for side, b in zip(shape, box, strict=True)]
    mask[tuple(slice(c, c + b) for c, b in zip(corner, box, strict=True))].fill_(False)
    return mask


def mix(image: Tensor, patch: Tensor, mask: Tensor) -> Tensor:
    """Return image * M + patch * (1 - M), for images and label maps alike.

    Args:
        image: (N, *S) or (N, channels, *S), kept where the mask is True.
        patch: the same shape and dtype, taken where the mask is False.
        mask: (*S), bool or 0/1, shared by the whole batch.

    Returns:
        A tensor of the image's shape and dtype.
    """
    return torch.where(mask.bool(), image, patch)
