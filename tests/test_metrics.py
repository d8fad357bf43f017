import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from medpy.metric import binary

from sdcl.metrics import case_metrics


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 3), st.floats(0.02, 0.9), st.booleans())
def test_agrees_with_medpy(seed, ndim, density, spaced):
    rng = np.random.default_rng(seed)
    shape = rng.integers(3, 9, ndim)
    prediction, reference = rng.random(shape) < density, rng.random(shape) < density
    prediction[(0,) * ndim] = reference[(-1,) * ndim] = True
    spacing = rng.uniform(0.5, 3, ndim) if spaced else None
    metrics = case_metrics(prediction, reference, spacing)
    assert metrics.dice == pytest.approx(binary.dc(prediction, reference), abs=1e-12)
    assert metrics.jaccard == pytest.approx(binary.jc(prediction, reference), abs=1e-12)
    assert metrics.hd95 == pytest.approx(binary.hd95(prediction, reference, spacing), abs=1e-9)
    assert metrics.asd == pytest.approx(binary.asd(prediction, reference, spacing), abs=1e-9)
    assert metrics.empty is False


def test_by_hand():
    prediction, reference = np.zeros((10, 10)), np.zeros((10, 10))
    prediction[2, 2], reference[2, 5] = 1, 1
    metrics = case_metrics(prediction, reference)
    assert (metrics.dice, metrics.jaccard, metrics.hd95, metrics.asd) == (0, 0, 3, 3)
    assert case_metrics(prediction, reference, spacing=(1, 0.5)).hd95 == 1.5
    same = case_metrics(reference, reference)
    assert (same.dice, same.jaccard, same.hd95, same.asd) == (1, 1, 0, 0)


def test_asd_is_directed_from_the_prediction():
    prediction, reference = np.zeros((1, 9)), np.zeros((1, 9))
    prediction[0, 0], reference[0, [0, 8]] = 1, 1
    assert case_metrics(prediction, reference).asd == 0
    assert case_metrics(reference, prediction).asd == 4


def test_empty_masks():
    full, empty = np.ones((3, 3)), np.zeros((3, 3))
    for prediction, reference, dice in ((empty, full, 0), (full, empty, 0), (empty, empty, math.nan)):
        metrics = case_metrics(prediction, reference)
        assert metrics.empty and math.isnan(metrics.hd95) and math.isnan(metrics.asd)
        assert metrics.dice == pytest.approx(dice, nan_ok=True)
        assert metrics.jaccard == pytest.approx(dice, nan_ok=True)


def test_distances_can_be_left_out_and_shapes_must_agree():
    metrics = case_metrics(np.ones((3, 3)), np.ones((3, 3)), distances=False)
    assert metrics.dice == 1 and math.isnan(metrics.hd95)
    with pytest.raises(ValueError, match=r"\(3, 3\) differs from the reference's \(3, 4\)"):
        case_metrics(np.ones((3, 3)), np.ones((3, 4)))
