"""What a table of several runs may say: intervals over patients, paired differences, exact tests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
EXACT_PATIENTS = 20  # up to so many all 2^n sign flips are counted
FINEST = 1e-10  # unit that differences are rounded to; scores have six digits
DRAWS = 100_000  # of sign flips beyond


@dataclass(frozen=True)
class Interval:
    """A mean over patients and its 95 % t interval; nan where there are too few of them."""

    patients: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A paired difference over patients.

    Attributes:
        difference: its mean and interval; of the patients that both have.
        p_permutation: two-sided, of all sign flips of the patients' differences.
        p_wilcoxon: two-sided, of the signed ranks.
        not_better: the probability that the first is not better, of the mean's t distribution.
    """

    difference: Interval
    p_permutation: float
    p_wilcoxon: float
    not_better: float


def interval(values: Sequence[float]) -> Interval:
    """Return the mean over patients with its t interval.

    Args:
        values: one a patient; nan is left out.
    """
    finite = np.asarray([v for v in values if not math.isnan(v)], float)
    n = len(finite)
    if n == 0:
        return Interval(0, math.nan, math.nan, math.nan)
    mean = float(finite.mean())
    if n == 1:
        return Interval(1, mean, math.nan, math.nan)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * finite.std(ddof=1) / math.sqrt(n))
    return Interval(n, mean, mean - half, mean + half)


def compare(ours: Sequence[float], theirs: Sequence[float], lower_is_better: bool = False, seed: int = 0) -> Comparison:
    """Compare two rows patient by patient.

    Args:
        ours: one value a patient.
        theirs: of the same patients, in the same order; patients that are nan in either are left out.
        lower_is_better: of distances.
        seed: of the permutations, where there are too many patients for all of them.

    Returns:
        ours minus theirs; nan where fewer than two patients are left.
    """
    pairs = np.subtract(np.asarray(ours, float), np.asarray(theirs, float))
    differences = rounded(pairs[~np.isnan(pairs)])
    found = interval(list(differences))
    if len(differences) < 2:
        return Comparison(found, math.nan, math.nan, math.nan)
    if not differences.any():  # the same in every patient
        return Comparison(found, 1.0, 1.0, 0.5)
    whole = np.rint(differences / unit_of(differences))  # sums of whole numbers have no rounding errors
    permuted = stats.permutation_test(
        (whole,), lambda x, axis: x.sum(axis), permutation_type="samples", vectorized=True,
        n_resamples=2**EXACT_PATIENTS if len(differences) <= EXACT_PATIENTS else DRAWS, batch=10_000,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    wilcoxon = stats.wilcoxon(whole, zero_method="zsplit", method="auto")
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    gain = (-1 if lower_is_better else 1) * found.mean
    # Where all patients differ by the same there is no spread: the difference is what it is.
    not_better = float(stats.t.sf(gain / error, len(differences) - 1)) if error > 0 else float(gain <= 0)
    return Comparison(found, float(permuted.pvalue), float(wilcoxon.pvalue), not_better)


def unit_of(differences: np.ndarray) -> float:
    """Return the power of ten that differences (n) are rounded to: as fine as their sums stay exact in float64."""
    largest = np.abs(differences).max(initial=0.0) * max(len(differences), 1)
    return max(FINEST, 10.0 ** math.ceil(math.log10(largest / 2**52))) if largest else FINEST


def rounded(differences: np.ndarray) -> np.ndarray:
    """Round differences (n), so that those which are equal but for errors of subtraction are equal."""
    unit = unit_of(differences)
    return np.rint(differences / unit) * unit


def holm(p_values: Sequence[float], planned: int = 0) -> list[float]:
    """Correct p-values for their number by Holm's step-down method (1979).

    Args:
        p_values: of the comparisons that are done, or nan, which stays nan.
        planned: comparisons in all; those that are not done yet count, or p-values would grow as a table fills.
    """
    known = [(p, i) for i, p in enumerate(p_values) if not math.isnan(p)]
    corrected, least = [math.nan] * len(p_values), 0.0
    for place, (p, i) in enumerate(sorted(known)):
        least = max(least, min(1.0, (max(len(known), planned) - place) * p))
        corrected[i] = least
    return corrected
