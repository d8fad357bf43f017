"""The statistics of tables, by hand and by counting."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sdcl.scoring.statistics import compare, holm, interval


def test_an_interval_by_hand():
    """Of 1, 2, 3, 4: mean 2.5, deviation 1.29099, error 0.645497, t(0.975, 3) = 3.182446."""
    found = interval([1.0, 2.0, math.nan, 3.0, 4.0])
    assert found.patients == 4 and found.mean == 2.5
    assert (found.low, found.high) == pytest.approx((2.5 - 3.182446 * 0.645497, 2.5 + 3.182446 * 0.645497), rel=1e-5)


@pytest.mark.parametrize("values", [[], [math.nan], [0.7]])
def test_too_few_patients_have_no_interval(values):
    found = interval(values)
    assert math.isnan(found.low) and math.isnan(found.high)
    assert found.patients == len([v for v in values if not math.isnan(v)])


def counted(differences):
    """The share of all sign flips whose mean is at least as far from 0."""
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(total >= abs(sum(differences)) * (1 - 1e-12) for total in sums) / len(sums)


@pytest.mark.parametrize("n", [2, 5, 10])
def test_permutations_are_counted_exactly(n):
    rng = np.random.default_rng(n)
    ours, theirs = rng.normal(0.3, 1, n), rng.normal(0, 1, n)
    found = compare(ours, theirs)
    assert found.p_permutation == pytest.approx(counted(list(ours - theirs)), abs=1e-12)


def test_all_in_one_direction_is_the_smallest_p():
    found = compare([1.0, 2.0, 3.0, 4.0, 5.0], [0.5, 1.1, 2.8, 3.1, 4.9])
    assert found.p_permutation == 2 / 2**5 and found.p_wilcoxon == 2 / 2**5
    assert found.difference.mean == pytest.approx(0.52) and found.not_better < 0.05


def test_the_other_way_round_has_the_same_p():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 30))
    one, other = compare(ours, theirs), compare(theirs, ours)
    assert one.p_permutation == pytest.approx(other.p_permutation, abs=0.02)  # 100,000 draws of 2^30
    assert one.p_wilcoxon == other.p_wilcoxon
    assert one.difference.mean == -other.difference.mean and one.not_better == pytest.approx(1 - other.not_better)
    assert compare(ours, theirs, lower_is_better=True).not_better == pytest.approx(1 - one.not_better)
    assert compare(ours, theirs) == one  # seeded


def test_patients_that_one_side_lacks_are_left_out():
    found = compare([1.0, math.nan, 3.0, 5.0], [0.0, 1.0, math.nan, 2.0])
    assert found.difference.patients == 2 and found.difference.mean == 2.0
    assert math.isnan(compare([1.0], [0.0]).p_permutation)


def test_equal_rows_do_not_differ():
    found = compare([0.5, 0.6], [0.5, 0.6])
    assert (found.difference.mean, found.p_permutation, found.p_wilcoxon, found.not_better) == (0, 1, 1, 0.5)


def test_holm_by_hand():
    """0.01 x 4, 0.02 x 3, 0.03 x 2, 0.04 x 1, each at least the one before."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.04, 0.01], planned=4) == pytest.approx([0.12, 0.04])
    assert holm([0.5, math.nan, 0.9])[::2] == [1.0, 1.0] and math.isnan(holm([0.5, math.nan])[1])


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_keeps_order_and_never_lowers(p_values):
    corrected = holm(p_values)
    assert all(p <= c <= 1 for p, c in zip(p_values, corrected, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert all(a <= b for a, b in itertools.pairwise(np.asarray(corrected)[order]))


def exact_wilcoxon(ours, theirs):
    """The rank sums of exact fractions, as whole numbers that scipy ranks without error."""
    differences = [Fraction(a) - Fraction(b) for a, b in zip(ours, theirs, strict=True)]
    unit = math.lcm(*(d.denominator for d in differences))
    whole = [int(d * unit) for d in differences]
    return stats.wilcoxon(whole, zero_method="zsplit", method="auto").pvalue if any(whole) else 1.0


def test_ties_are_those_of_exact_arithmetic():
    """Scores of two decimals tie often: 0.81 - 0.79 and 0.42 - 0.40 are the same difference."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        n = int(rng.integers(5, 10))
        texts = [[f"{k / 100:.2f}" for k in rng.integers(60, 75, n)] for _ in range(2)]
        found = compare(*[[float(text) for text in row] for row in texts])
        assert found.p_wilcoxon == pytest.approx(exact_wilcoxon(*texts), abs=1e-12)
        if n <= 8:
            whole = [round(100 * (float(a) - float(b))) for a, b in zip(*texts, strict=True)]
            assert found.p_permutation == pytest.approx(counted(whole), abs=1e-12)


def test_differences_of_any_size_keep_their_digits():
    for scale in (1e-6, 1.0, 1e6):
        found = compare([scale * x for x in (1.5, 2.25, 4.0)], [0.0, 0.0, 0.0])
        assert found.difference.mean == pytest.approx(scale * 7.75 / 3, rel=1e-4)
        assert found.p_permutation == 2 / 2**3
