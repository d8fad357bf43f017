"""The 3D networks at half the resolution: an eighth of the voxels, or eight times the surroundings in as many."""

from torch import Tensor, nn
from torch.nn import functional as F

from sdcl.networks.resvnet import ResVNet
from sdcl.networks.vnet import VNet


class LowRes(nn.Module):
    """A 3D network that sees the means of 2x2x2 voxels; its logits are interpolated back.

    Its weights are "network.<name>", so that those of a network at full resolution are not taken for them.

    Args:
        network: maps (N, in_channels, *S / 2) to (N, C, *S / 2).
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, X, Y, Z) to logits (N, C, X, Y, Z); every side is a multiple of 32."""
        return F.interpolate(self.network(F.avg_pool3d(x, 2)), scale_factor=2, mode="trilinear")


class LowResVNet(LowRes):
    """V-Net at half the resolution."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__(VNet(in_channels, num_classes))


class LowResResVNet(LowRes):
    """ResVNet at half the resolution."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__(ResVNet(in_channels, num_classes))
