import json

import numpy as np
import pytest
import torch
from helpers import GOLDEN, fill, strided

from sdcl.networks import NETWORKS, build_network

FIGURES = json.loads((GOLDEN / "networks.json").read_text())
CLASSES = {"unet": 4, "resunet": 4, "vnet": 2, "resvnet": 2}
PARAMETERS = {"unet": 1_813_764, "resunet": 5_953_092, "vnet": 9_443_266, "resvnet": 17_920_018}


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes_are_the_published_ones(name):
    state = build_network(name, CLASSES[name]).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == FIGURES[name]["used"]
    assert list(state) == list(FIGURES[name]["used"])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_takes_part(name):
    network = build_network(name, CLASSES[name])
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]
    image = torch.randn(2, 1, *([32, 16, 16] if "vnet" in name else [32, 16]))
    network(image).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("name", ["unet", "vnet"])
def test_output_is_the_golden_one(name):
    figures = FIGURES[name]
    network = fill(build_network(name, CLASSES[name]), 0).eval()
    image = np.random.RandomState(figures["eval_input"]["seed"]).standard_normal(figures["eval_input"]["shape"])
    with torch.no_grad():
        output = network(torch.from_numpy(image.astype(np.float32))).numpy()
    expected = figures["eval_output"]
    assert list(output.shape) == expected["shape"]
    tolerance = 1e-4 * expected["std"]
    np.testing.assert_allclose(strided(output, 64), expected["sample"], atol=tolerance)
    np.testing.assert_allclose([output.mean(), output.std()], [expected["mean"], expected["std"]], atol=tolerance)


@pytest.mark.parametrize(("name", "shape"), [("unet", (16, 48)), ("resunet", (48, 16)), ("vnet", (16, 32, 16)), ("resvnet", (32, 16, 16))])  # fmt: skip # noqa: E501
@pytest.mark.parametrize("classes", [2, 5])
def test_any_multiple_of_16_classes_and_channels(name, shape, classes):
    network = build_network(name, classes, in_channels=3).eval()
    with torch.no_grad():
        assert network(torch.randn(1, 3, *shape)).shape == (1, classes, *shape)


def test_dropout_is_where_the_method_has_it():
    """Without it two passes in train mode agree; the ResNet students drop only in the 3D head, not in 2D."""
    for name, drops in (("unet", True), ("resunet", False), ("vnet", True), ("resvnet", True)):
        torch.manual_seed(0)
        network = build_network(name, 2).train()
        image = torch.randn(2, 1, *([32, 16, 16] if "vnet" in name else [32, 32]))
        with torch.no_grad():
            assert (not torch.equal(network(image), network(image))) == drops, name


def test_unknown_name_and_counts_are_refused():
    with pytest.raises(ValueError, match="unknown network 'segnet': choose one of vnet"):
        build_network("segnet", 2)
    with pytest.raises(ValueError, match="num_classes 1"):
        build_network("unet", 1)
