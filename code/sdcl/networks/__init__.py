"""The four networks of the method, by name, and the 3D ones at half the resolution."""

import math

from torch import nn

from sdcl.networks.lowres import LowResResVNet, LowResVNet
from sdcl.networks.resunet import ResUNet
from sdcl.networks.resvnet import ResVNet
from sdcl.networks.unet import UNet
from sdcl.networks.vnet import VNet

NETWORKS: dict[str, type[nn.Module]] = {
    "vnet": VNet, "resvnet": ResVNet, "unet": UNet, "resunet": ResUNet,
    "vnet_lowres": LowResVNet, "resvnet_lowres": LowResResVNet,
}  # fmt: skip


def build_network(
    name: str, num_classes: int, in_channels: int = 1, dropout: float = 1.0, foreground_prior: float = 0.0
) -> nn.Module:
    """Build a network with freshly initialised weights.

    Args:
        name: "vnet", "resvnet", "vnet_lowres" or "resvnet_lowres" (3D), "unet" or "resunet" (2D).
        num_classes: number of classes C, background included; at least 2.
        in_channels: channels of the input image.
        dropout: share of the published rates of dropout, in [0, 1].
        foreground_prior: in [0, 1). Above 0 the last layer's biases, not its weights, are the log of this probability,
            shared equally by the C - 1 foreground classes, and of the background's: training need not find them.

    Returns:
        A module whose forward takes (N, in_channels, *S) and returns logits (N, C, *S); every side of S is a
        multiple of 16, of 32 where the name ends in "_lowres". Parameter names are those of the published checkpoints,
        behind "network." in the latter.

    Raises:
        ValueError: the name is unknown, a count is too small, or the prior is outside its range.

    Source: docs/method.md, "Networks"; the prior: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, 3.3.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}: choose one of {', '.join(NETWORKS)}")
    if num_classes < 2 or in_channels < 1:
        raise ValueError(f"num_classes {num_classes} must be at least 2 and in_channels {in_channels} at least 1")
    if not 0 <= foreground_prior < 1:
        raise ValueError(f"foreground_prior {foreground_prior} must lie in [0, 1)")
    network = NETWORKS[name](in_channels, num_classes)
    for module in network.modules():
        if isinstance(module, nn.Dropout | nn.Dropout3d):
            module.p *= dropout
    if foreground_prior:
        last = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)][-1]
        nn.init.constant_(last.bias, math.log(foreground_prior / (num_classes - 1)))
        nn.init.constant_(last.bias[0], math.log(1 - foreground_prior))
    return network
