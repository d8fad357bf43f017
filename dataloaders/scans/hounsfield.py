"""Whether a scan's values look like Hounsfield units: by their range, the peak of air and the peak of soft tissue."""

import numpy as np

WINDOW_HU = (-125.0, 275.0)  # the window that "ct" maps to [0, 1]
TRUSTED_HU = "trusted"  # the attribute `hu` of a file that was made with --trust_hu
SAMPLED = 2**21  # voxels that are looked at, at most about
PADDING_BELOW = -1500.0  # no tissue; scanners fill the corners of a slice with -2000, -3024 and the like
LEAST_RANGE = 100.0  # HU that a CT spans: air, fat and muscle differ by more
LOWER_THAN_WATER, FAT = -30.0, -75.0  # air and fat lie below the first, and most of their voxels below the second
IMPOSSIBLE = 10_000.0  # beyond what more than specks of metal have
AIR, SHIFTED, BETWEEN = (-1200.0, -700.0), (800.0, 1600.0), (400.0, 700.0)


def hu_fault(array: np.ndarray) -> str:
    """Say why values are no HU, or "".

    A CT spans more than 100 HU, has air or fat below water, and its soft tissue lies at about 0 to 100 HU. Values
    that are stored with an offset of about 1000 have their air at 0 and their soft tissue at 1000. Bone lies there too,
    but it is less, and has a rim of all values below.
    """
    values = array.ravel()
    values = values[:: max(1, values.size // SAMPLED)]
    inside = float(((values > WINDOW_HU[0]) & (values < WINDOW_HU[1])).mean())
    shown = f"{100 * inside:.1f} % of it within {WINDOW_HU[0]:g} to {WINDOW_HU[1]:g}"
    if inside < 0.01:
        return shown
    high = float((values > IMPOSSIBLE).mean())
    if high > 0.01:
        return f"{100 * high:.1f} % of it above {IMPOSSIBLE:g}, such as padding that the header does not declare"
    values = values[values >= PADDING_BELOW]
    if np.ptp(values) < LEAST_RANGE:
        return f"{shown}, a range of {np.ptp(values):.3g} as of scaled or z-scored values"
    if float((values < LOWER_THAN_WATER).mean()) < 0.001:
        return f"{shown}, without air or fat below {LOWER_THAN_WATER:g}"
    air, shifted, between = (float(((values > a) & (values < b)).mean()) for a, b in (AIR, SHIFTED, BETWEEN))
    if (shifted >= 0.15 and between < shifted / 2) or (air < 0.01 <= shifted and between < shifted / 4):
        return f"{100 * shifted:.0f} % of it within {SHIFTED[0]:g} to {SHIFTED[1]:g}, as if 1024 had been added"
    return ""


def prepared_fault(image: np.ndarray) -> str:
    """Say why an image that was mapped from WINDOW_HU to [0, 1] was no CT in HU, or "".

    Args:
        image: in [0, 1], a whole scan or slices of one.
    """
    low, high = WINDOW_HU
    least, most = float(image.min()), float(image.max())
    if least < most < least + LEAST_RANGE / (high - low):
        return f"its values span {(most - least) * (high - low):.2g} HU"
    lower = float((image < (FAT - low) / (high - low)).mean())
    above = float((image >= 1).mean())
    if lower < 0.001 and above >= 0.1:
        return f"{100 * above:.0f} % of it lie above {high:g} HU, and nothing is air or fat"
    return ""
