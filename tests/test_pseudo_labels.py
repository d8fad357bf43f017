import os
import signal

import numpy as np
import pytest
import torch
from helpers import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from sdcl.pseudo_labels import largest_components, pseudo_label

FIGURES = np.load(GOLDEN / "pseudo_labels.npz")


@pytest.mark.parametrize(
    ("name", "logits", "rule", "connectivity"),
    [("la", "logits3", "threshold", 26), ("pancreas", "logits3", "threshold", 18), ("acdc", "logits2", "argmax", 8)],
)
def test_golden_at_the_percolation_threshold(name, logits, rule, connectivity):
    result = pseudo_label(torch.from_numpy(FIGURES[logits]), rule, connectivity)
    assert result.dtype == torch.uint8
    np.testing.assert_array_equal(result.numpy(), FIGURES[name])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(2, 4), (2, 8), (3, 6), (3, 18), (3, 26)]), st.integers(2, 4))
def test_keeps_the_first_of_the_largest_components(seed, dimension, classes):
    """Against scipy's labelling, which numbers components in raster order, so that argmax takes the first."""
    ndim, connectivity = dimension
    labels = np.random.default_rng(seed).integers(0, classes, (7,) * ndim).astype(np.uint8)
    order = {4: 1, 8: 2, 6: 1, 18: 2, 26: 3}[connectivity]
    expected = np.zeros_like(labels)
    for c in range(1, classes):
        parts, count = ndimage.label(labels == c, ndimage.generate_binary_structure(ndim, order))
        if count:
            expected[parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])] = c
    np.testing.assert_array_equal(largest_components(labels, connectivity), expected)


def test_ties_absent_classes_and_full_images():
    np.testing.assert_array_equal(largest_components(np.array([[0, 2, 0, 2]], np.uint8), 8), [[0, 2, 0, 0]])
    np.testing.assert_array_equal(largest_components(np.zeros((2, 3), np.uint8), 4), np.zeros((2, 3)))
    np.testing.assert_array_equal(largest_components(np.full((2, 3), 2, np.uint8), 4), np.full((2, 3), 2))
    diagonal = np.eye(3, dtype=np.uint8)
    assert largest_components(diagonal, 8).sum() == 3 and largest_components(diagonal, 4).sum() == 1


def test_three_dimensions_with_several_classes():
    logits = torch.full((1, 3, 3, 3, 3), -5.0)
    logits[:, 0] = 0
    for c, voxels in ((1, [(0, 0, 0), (0, 0, 1), (2, 2, 2)]), (2, [(1, 1, 1)])):
        for x, y, z in voxels:
            logits[0, c, x, y, z] = 9
    result = pseudo_label(logits, "argmax", 6)[0]
    assert result[0, 0].tolist() == [1, 1, 0] and result[2, 2, 2] == 0 and result[1, 1, 1] == 2


def test_one_half_is_foreground():
    assert pseudo_label(torch.zeros(1, 2, 2, 2), "threshold", 8).sum() == 4
    assert pseudo_label(torch.zeros(1, 2, 2, 2), "argmax", 8).sum() == 0


def test_refusals():
    with pytest.raises(ValueError, match="needs two classes, not 3"):
        pseudo_label(torch.zeros(1, 3, 2, 2), "threshold", 8)
    with pytest.raises(ValueError, match="unknown rule"):
        pseudo_label(torch.zeros(1, 2, 2, 2), "vote", 8)
    with pytest.raises(ValueError, match="connectivity 26"):
        pseudo_label(torch.zeros(1, 2, 2, 2), "argmax", 26)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_cleans_with_threads_of_its_own():
    """As a DataLoader's workers do; its parent's threads are not in it, and waiting for them would never end."""
    logits = torch.zeros(1, 2, 2, 2)
    pseudo_label(logits, "threshold", 8)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits
        torch.set_num_threads(1)  # as DataLoader does: OpenMP's threads are not there either
        os._exit(int(pseudo_label(logits, "threshold", 8).sum() != 4))
    assert os.waitpid(child, 0)[1] == 0
