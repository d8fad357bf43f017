"""Does a label lie on its image? What a flipped label looks like, told from the intensities alone."""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from sdcl.runs.errors import UserError

# A label that lies right has steps of intensity at its border. On 39 real scans (38 LA, 1 CT) it had 1.1 to 2 times the
# steps inside it, and every flip of it less; a flip that has this much more is the better place for the label.
CLEARLY_BETTER = 1.25
SOFT_TISSUE_HU = (-20.0, 180.0)  # organs in contrast-enhanced CT, without fat, air and bone
LEAST_SHARE = 0.7  # of an organ's label that must be soft tissue
TRUSTED = "trusted"  # value of a file's attribute `alignment`: somebody has looked
AXES = "xyz"
FLIPS = [flip for count in range(4) for flip in combinations(range(3), count)]


@dataclass(frozen=True)
class Alignment:
    """How well a label lies on its image.

    Attributes:
        contrast: step of intensity at the label's border over the one inside it.
        best_flip: axes by which the label, flipped, would have the highest contrast; () for none.
        best_contrast: that one.
        mean: intensity under the label.
        soft_share: share of the label in SOFT_TISSUE_HU, if the image is in HU.
    """

    contrast: float
    best_flip: tuple[int, ...]
    best_contrast: float
    mean: float
    soft_share: float

    @property
    def is_suspect(self) -> bool:
        """Tell whether a flip fits clearly better."""
        return self.best_contrast > CLEARLY_BETTER * self.contrast


def measure_alignment(image: np.ndarray, label: np.ndarray) -> Alignment:
    """Compare a label's place with its flips.

    Args:
        image: (X, Y, Z); a CT in HU, clipped to the window that training uses.
        label: (X, Y, Z), integers, with some foreground.
    """
    mask = label > 0
    scores = {flip: border_contrast(image, np.flip(mask, flip)) for flip in FLIPS}
    best = max(scores, key=lambda flip: scores[flip])
    values = image[mask]
    soft = float(((values > SOFT_TISSUE_HU[0]) & (values < SOFT_TISSUE_HU[1])).mean())
    return Alignment(scores[()], best, scores[best], float(values.mean(dtype=np.float64)), soft)


def border_contrast(image: np.ndarray, mask: np.ndarray) -> float:
    """Return the mean absolute step between neighbours across a mask's border over the one within; 0 for none within.

    Args:
        image: (X, Y, Z).
        mask: (X, Y, Z), bool, not empty.
    """
    box = []
    for axis, side in enumerate(mask.shape):
        filled = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(max(filled[0] - 1, 0), min(filled[-1] + 2, side)))
    image, mask = image[tuple(box)].astype(np.float64), mask[tuple(box)]
    across, within = np.zeros(2), np.zeros(2)  # sum and count of steps
    for axis in range(3):
        step = np.abs(np.diff(image, axis=axis))
        one, other = (np.take(mask, range(k, mask.shape[axis] - 1 + k), axis) for k in (0, 1))
        for total, chosen in ((across, one != other), (within, one & other)):
            total += step[chosen].sum(dtype=np.float64), np.count_nonzero(chosen)
    if not across[1] or not within[0]:
        return 0.0
    return float(across[0] / across[1] / (within[0] / within[1]))


def check_alignment(path: Path, image: np.ndarray, label: np.ndarray, *, is_organ_ct: bool, way_out: str) -> Alignment:
    """Refuse a label that lies better flipped, or, of an organ in CT, not on soft tissue.

    Args:
        path: of the label, for the message.
        image: see measure_alignment().
        label: see measure_alignment().
        is_organ_ct: the image is in HU and the label an organ's.
        way_out: what to do, once somebody has looked and finds the label right.

    Raises:
        UserError: names the flip that would fit.
    """
    found = measure_alignment(image, label)
    by = ", ".join(AXES[axis] for axis in found.best_flip)
    mean = f", mean {found.mean:.0f} HU" if is_organ_ct else ""
    if found.is_suspect:
        raise UserError(
            f"{path} does not seem to lie on its image (contrast at its border {found.contrast:.2f}{mean}); flipped "
            f"along {by} it would fit ({found.best_contrast:.2f}): flip it, or, if a look shows it right, {way_out}."
        )
    if is_organ_ct and found.soft_share < LEAST_SHARE:
        raise UserError(
            f"{path} does not lie on soft tissue: {100 * found.soft_share:.0f} % of it within {SOFT_TISSUE_HU[0]:g} to "
            f"{SOFT_TISSUE_HU[1]:g} HU{mean}: give the label of this scan, or, if a look shows it right, {way_out}."
        )
    return found
