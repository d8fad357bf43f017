"""The V-Net decoder on a 3D ResNet-34 encoder: second student on LA and Pancreas."""

import re

from torch import Tensor

from sdcl.networks.layers import Conv3d, InstanceNorm
from sdcl.networks.resnet import ResNetEncoder
from sdcl.networks.vnet import STAGES_DOWN, VNetDecoder


class ResVNet(VNetDecoder):
    """ResNet-34 encoder with InstanceNorm (no affine), V-Net decoder; its only dropout is the head's."""

    # The published checkpoints carry a V-Net encoder that no forward pass reads.
    unused_names = re.compile(rf"({'|'.join(STAGES_DOWN)})(_dw)?\.conv\.[036]\.(weight|bias)")

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.resencoder = ResNetEncoder(Conv3d, InstanceNorm, in_channels)
        self.add_decoder(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, X, Y, Z) to logits (N, C, X, Y, Z); every side is a multiple of 16."""
        return self.decode(self.resencoder(x))
