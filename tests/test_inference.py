import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from sdcl.inference import nearest_zoom, slice_wise, sliding_window
from sdcl.windows import GAUSSIAN_SIGMA, window_profile


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
        assert not self.training and not torch.is_grad_enabled() and x.dtype == torch.float32
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


def test_slices_beyond_scipys_zoom_are_background():
    """A network that sees class 2 everywhere: only where the zoom back finds no pixel is it background."""
    volume = np.ones((1, 24, 30))  # float64 is taken too
    (result,) = slice_wise([Threshold(9)], volume, (64, 64), 3)
    assert result[0, 0, -1].tolist() == [1.0] * 30 and not result[1:, 0, -1].any()
    assert (result[:, 0, :-1].argmax(0) == 2).all()


class Recorder(nn.Module):
    """Records in which type a CPU's convolution would compute."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.types = set()

    def forward(self, x):
        enabled = torch.is_autocast_enabled("cpu")
        self.types.add(torch.get_autocast_dtype("cpu") if enabled else torch.float32)
        return torch.cat([x * 0, x], 1)


@pytest.mark.parametrize(("precision", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_networks_predict_in_the_precision_asked_for(precision, expected):
    volume = np.zeros((4, 4, 4), np.float32)
    for infer in (
        lambda network: slice_wise([network], volume, (4, 4), 2, precision=precision),
        lambda network: sliding_window([network], volume, (4, 4, 4), (4, 4, 4), 2, precision=precision),
        lambda network: sliding_window([network], volume, (4, 4, 4), (4, 4, 4), 2, precision=precision, tta=True),
    ):
        network = Recorder()
        assert infer(network)[0].dtype == np.float32 and network.types == {expected}


@pytest.mark.parametrize("patch", [16, 17, 96])
def test_a_gaussian_window_has_its_width_and_its_middle(patch):
    profile = window_profile(patch, "gaussian").double()
    assert torch.equal(profile, profile.flip(0)) and GAUSSIAN_SIGMA == 1 / 8
    places = torch.arange(patch).double()
    width = ((profile * (places - (patch - 1) / 2) ** 2).sum() / profile.sum()).sqrt()
    assert width.item() == pytest.approx(patch / 8, rel=0.02)  # its standard deviation, an eighth of the window
    assert profile.min() == pytest.approx(1e-3)  # so that no voxel has the weight 0
    assert window_profile(patch, "constant").tolist() == [1.0] * patch


class Recording(nn.Module):
    """A network of two parts that keeps the modes in which it is called."""

    def __init__(self):
        super().__init__()
        self.layer, self.dropout, self.modes = nn.Conv3d(1, 2, 1), nn.Dropout(), []

    def forward(self, x):
        self.modes.append((self.training, self.dropout.training))
        x = self.dropout(x)
        return self.layer(x) if x.ndim == 5 else self.layer(x[:, :, None])[:, :, 0]


@pytest.mark.parametrize("weights", [True, False])
def test_networks_are_in_eval_mode_meanwhile_and_get_their_own_modes_back(weights):
    """Each module its own: a dropout that the caller has switched off stays off."""
    networks = [Recording().train(), Recording().train(weights)]
    networks[0].dropout.eval()
    volume = np.zeros((4, 4, 4), np.float32)
    sliding_window(networks, volume, (4, 4, 4), (2, 2, 2), 2, tta=weights)
    slice_wise(networks, volume, (4, 4), 2)
    assert all(mode == (False, False) for network in networks for mode in network.modes) and networks[0].modes
    assert [(n.training, n.dropout.training, n.layer.training) for n in networks] == [
        (True, False, True), (weights, weights, weights),
    ]  # fmt: skip

    def fail(*_):
        raise RuntimeError

    networks[0].layer.forward = fail
    with pytest.raises(RuntimeError):
        slice_wise(networks, volume, (4, 4), 2)
    assert networks[0].training and not networks[0].dropout.training
