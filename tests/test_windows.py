"""Windows of one value throughout, computed once a value: the same results, and fewer calls of the networks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sdcl.inference import Windows, put_together, window_slabs
from sdcl.windows import KEPT_VALUES, evenly, only_value


class Counting(nn.Module):
    """A convolution that sees a window's borders, of any number of channels; counts the windows that it gets."""

    def __init__(self, channels=1, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.windows = nn.Conv3d(channels, classes, 3, padding=1), 0

    def forward(self, x):
        self.windows += len(x)
        return self.conv(x)


def found(volume, *, batch_size=4, skip_air=True, **how):
    """Return the probabilities of a network, the windows that it got, and windows done and not computed."""
    network, told = Counting(volume.shape[0] if volume.ndim == 4 else 1), []
    windows = Windows((8, 8, 8), (4, 4, 4), 3, batch_size, skip_air=skip_air, on_done=lambda *n: told.append(n), **how)
    (result,) = put_together(window_slabs([network], volume, windows), volume.shape[-3:])
    return result, network.windows, tuple(map(sum, zip(*told, strict=True)))


def half_empty(shape=(8, 8, 24)):
    """Noise in the last axis's last eight planes, zeros before them."""
    volume = np.zeros(shape, np.float32)
    volume[..., 16:] = np.random.default_rng(0).random(volume[..., 16:].shape)
    return volume


@given(st.integers(1, 60), st.integers(1, 9))
def test_groups_are_even(count, most):
    groups = evenly([(k, 0, 0) for k in range(count)], most)
    sizes = [len(group) for group in groups]
    assert [place[0] for group in groups for place in group] == list(range(count))
    assert len(groups) == -(-count // most) and max(sizes) <= most and max(sizes) - min(sizes) <= 1
    assert min(sizes) > 1 or count == 1 or most <= 2


@pytest.mark.parametrize("how", [{}, {"weighting": "gaussian"}])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5])
def test_empty_windows_are_computed_once(batch_size, how):
    """Windows begin at planes 0, 4, 8, 12 and 16; the first three are zeros: of five, two need not be computed."""
    result, windows, done = found(half_empty(), batch_size=batch_size, **how)
    plain, all_windows, all_done = found(half_empty(), batch_size=batch_size, skip_air=False, **how)
    assert done == (5, 2) and all_done == (5, 0) and all_windows == 5
    # Batches are (0), (4, 8), (12, 16) by twos and (0, 4), (8, 12, 16) by threes and fours; 0, the only window left of
    # a batch that had more, goes through the network twice.
    assert windows == {1: 3, 2: 3, 3: 3 + 1, 4: 3 + 1, 5: 3}[batch_size]
    np.testing.assert_allclose(result, plain, atol=1e-6)
    np.testing.assert_array_equal(result.argmax(0), plain.argmax(0))


def test_flips_of_empty_windows_are_computed_once_too():
    result, windows, done = found(half_empty(), tta=True, batch_size=1)
    assert done == (5, 2) and windows == 3 * 8
    np.testing.assert_allclose(result, found(half_empty(), tta=True, skip_air=False)[0], atol=1e-6)


def test_every_channel_must_hold_one_value():
    volume = np.zeros((2, 24, 8, 8), np.float32)
    volume[1, :8] = np.random.default_rng(0).random((8, 8, 8))
    result, _, done = found(volume)
    assert done == (5, 2)  # windows at 0 and 4 see the second channel's noise; of 8, 12 and 16 one is computed
    np.testing.assert_allclose(result, found(volume, skip_air=False)[0], atol=1e-6)
    volume[:, 8:] = np.array([1, 2])[:, None, None, None]
    assert only_value(volume, (8, 0, 0), (8, 8, 8)) == (1, 2) and only_value(volume, (4, 0, 0), (8, 8, 8)) is None


def test_few_values_are_kept():
    """Steps of one value each, as masks and phantoms have them: those beyond the first few are computed each time."""
    volume = np.repeat(np.arange(20, dtype=np.float32), 12)[:, None, None] * np.ones((1, 8, 8), np.float32)
    twice = np.concatenate([volume, volume])
    result, _, (count, skipped) = found(twice, batch_size=1)
    assert count == 119 and skipped == KEPT_VALUES * 2 * 2 - KEPT_VALUES  # two windows see one step alone, both times
    np.testing.assert_allclose(result, found(twice, skip_air=False)[0], atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(4, 20), min_size=3, max_size=3), st.lists(st.integers(0, 20), min_size=6, max_size=6),
    st.integers(1, 5), st.sampled_from([0.0, 1.0, -3.0]),
)  # fmt: skip
def test_skipping_changes_nothing(shape, corners, batch_size, value):
    volume = np.random.default_rng(0).random(shape).astype(np.float32)
    box = tuple(slice(min(a, b), max(a, b)) for a, b in zip(corners[:3], corners[3:], strict=True))
    volume[box] = value
    results = [found(volume, batch_size=batch_size, skip_air=skips)[0] for skips in (True, False)]
    np.testing.assert_allclose(*results, atol=1e-6)
