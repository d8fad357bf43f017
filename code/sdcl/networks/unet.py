"""The 2D U-Net: first student and teacher on ACDC."""

import re

import torch
from torch import Tensor, nn

from sdcl.networks.layers import BatchNorm, Dropout

WIDTHS = (16, 32, 64, 128, 256)
ENCODER_DROPOUT = (0.05, 0.1, 0.2, 0.3, 0.5)
# Heads that the published 2D checkpoints carry and no forward pass reads.
UNUSED_2D_NAMES = re.compile(
    r"(projection_head|prediction_head|contrastive_class_selector_(memory)?\d+)\."
    r"([03]\.(weight|bias)|1\.(weight|bias|running_mean|running_var|num_batches_tracked))"
)


class ConvBlock(nn.Module):
    """Twice a 3x3 convolution, BatchNorm and LeakyReLU, with dropout between."""

    def __init__(self, width_in: int, width: int, dropout: float):
        super().__init__()
        self.conv_conv = nn.Sequential(
            nn.Conv2d(width_in, width, 3, padding=1),
            BatchNorm(width),
            nn.LeakyReLU(0.01, inplace=True),
            Dropout(dropout),
            nn.Conv2d(width, width, 3, padding=1),
            BatchNorm(width),
            nn.LeakyReLU(0.01, inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width_in, H, W) to (N, width, H, W)."""
        return self.conv_conv(x)


class DownBlock(nn.Module):
    """Max-pooling by 2, then a ConvBlock."""

    def __init__(self, width_in: int, width: int, dropout: float):
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), ConvBlock(width_in, width, dropout))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width_in, H, W) to (N, width, H/2, W/2)."""
        return self.maxpool_conv(x)


class UpBlock(nn.Module):
    """A 1x1 convolution to the skip's width, bilinear doubling, concatenation with the skip, a ConvBlock."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.conv1x1 = nn.Conv2d(width_in, width, 1)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv = ConvBlock(2 * width, width, dropout=0.0)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map (N, width_in, H, W) and a skip (N, width, 2H, 2W) to (N, width, 2H, 2W)."""
        up = self.up(self.conv1x1(x)).to(skip.dtype)  # autocast doubles in float32; the block would cast it back anyway
        if up.requires_grad and up.device.type == "cpu" and not torch.compiler.is_compiling():
            # The concatenation's gradient is a view with gaps, of which the doubling's takes four times as long.
            up.register_hook(lambda gradient: None if gradient is None else gradient.clone())
        return self.conv(torch.cat([skip, up], dim=1))


class UNetEncoder(nn.Module):
    """Features of five sizes, each half the one before."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.in_conv = ConvBlock(in_channels, WIDTHS[0], ENCODER_DROPOUT[0])
        for i in range(1, len(WIDTHS)):
            setattr(self, f"down{i}", DownBlock(WIDTHS[i - 1], WIDTHS[i], ENCODER_DROPOUT[i]))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (N, in_channels, H, W) to five feature maps, from 16 channels at full size to 256 at 1/16."""
        features = [self.in_conv(x)]
        for down in (self.down1, self.down2, self.down3, self.down4):
            features.append(down(features[-1]))
        return features


class UNetDecoder(nn.Module):
    """From the encoder's five feature maps to logits; shared by UNet and ResUNet."""

    def __init__(self, num_classes: int):
        super().__init__()
        for i in range(1, len(WIDTHS)):
            setattr(self, f"up{i}", UpBlock(WIDTHS[-i], WIDTHS[-i - 1]))
        self.out_conv = nn.Conv2d(WIDTHS[0], num_classes, 3, padding=1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Map the feature maps to logits (N, C, H, W)."""
        *skips, x = features
        for up, skip in zip((self.up1, self.up2, self.up3, self.up4), reversed(skips), strict=True):
            x = up(x, skip)
        return self.out_conv(x)


def initialise(network: nn.Module) -> None:
    """Give convolutions Kaiming-normal weights and BatchNorm weight 1 and bias 0 (docs/method.md, "Networks")."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class UNet(nn.Module):
    """U-Net with widths 16 to 256 and concatenated skips."""

    unused_names = UNUSED_2D_NAMES

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.encoder = UNetEncoder(in_channels)
        self.decoder = UNetDecoder(num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to logits (N, C, H, W); H and W are multiples of 16."""
        return self.decoder(self.encoder(x))
