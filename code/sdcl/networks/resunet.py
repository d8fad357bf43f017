"""The U-Net decoder on a 2D ResNet-34 encoder: second student on ACDC."""

from torch import Tensor, nn

from sdcl.networks.layers import BatchNorm
from sdcl.networks.resnet import ResNetEncoder
from sdcl.networks.unet import UNUSED_2D_NAMES, UNetDecoder, initialise


class ResUNet(nn.Module):
    """ResNet-34 encoder with BatchNorm, U-Net decoder; no dropout."""

    unused_names = UNUSED_2D_NAMES

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.encoder = ResNetEncoder(nn.Conv2d, BatchNorm, in_channels)
        self.decoder = UNetDecoder(num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to logits (N, C, H, W); H and W are multiples of 16."""
        return self.decoder(self.encoder(x))
