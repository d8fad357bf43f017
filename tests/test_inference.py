import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from sdcl.inference import nearest_zoom, slice_wise


@pytest.mark.parametrize("size", [(16, 16), (24, 12), (64, 27), (144, 256), (256, 14)])
@pytest.mark.parametrize("shape", [(24, 31), (64, 64), (256, 128)])
def test_zoom_shows_scipys_pixels(shape, size):
    """Also for the sizes where scipy's rounding blanks the last row, such as 64 to 24."""
    image = np.random.default_rng(0).random(shape).astype(np.float32) + 1
    expected = ndimage.zoom(image, [out / side for out, side in zip(size, shape, strict=True)], order=0)
    np.testing.assert_array_equal(nearest_zoom(image, size), expected)


def test_zoom_of_some_sizes_leaves_a_blank_end():
    assert (nearest_zoom(np.ones((2, 64, 64)), (24, 24))[:, -1] == 0).all()
    assert (nearest_zoom(np.ones((64, 64)), (24, 24), fill=7)[-1] == 7).all()


class Threshold(nn.Module):
    """Class c has the logit c times the pixel; counts its calls."""

    def __init__(self, sign):
        super().__init__()
        self.sign = nn.Parameter(torch.tensor(float(sign)))
        self.images = 0

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        self.images += len(x)
        return torch.cat([torch.zeros_like(x), self.sign * x, 2 * self.sign * x - 1], dim=1)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_slice_wise_is_zoom_predict_zoom_back(batch_size):
    volume = np.random.default_rng(1).standard_normal((5, 64, 30)).astype(np.float32)
    networks = [Threshold(1), Threshold(-2)]
    results = slice_wise(networks, volume, (24, 32), 3, batch_size)
    assert [network.images for network in networks] == [5, 5]  # every slice once, whatever the batches
    for network, result in zip(networks, results, strict=True):
        assert result.shape == (3, 5, 64, 30) and result.dtype == np.float32
        np.testing.assert_allclose(result.sum(0), 1, atol=1e-6)
        for k, image in enumerate(volume):
            zoomed = ndimage.zoom(image, (24 / 64, 32 / 30), order=0)
            with torch.no_grad():
                label = network.eval()(torch.from_numpy(zoomed)[None, None])[0].argmax(0).numpy()
            expected = ndimage.zoom(label, (64 / 24, 30 / 32), order=0)
            np.testing.assert_array_equal(result[:, k].argmax(0), expected)
