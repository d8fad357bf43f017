"""The ResNet-34 encoder of the second student, 2D or 3D, with a stem that keeps the full size."""

from collections.abc import Callable

from torch import Tensor, nn

from sdcl.networks.layers import every_second

BLOCKS_PER_STAGE = (3, 4, 6, 3)
WIDTHS = (16, 32, 64, 128, 256)  # the stem's, then one a stage


class BasicBlock(nn.Module):
    """Two 3-wide convolutions with a residual connection."""

    def __init__(self, conv: type[nn.Module], norm: Callable[[int], nn.Module], width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = conv(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, padding=1, bias=False)
        self.bn2 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        self.halves = stride == 2
        if self.halves or width_in != width:
            # Of stride 1 on every second voxel: with AVX2 alone oneDNN's strided 1-wide convolution writes past its
            # memory where the input has fewer than 8 channels.
            self.downsample = nn.Sequential(conv(width_in, width, 1, bias=False), norm(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width_in, *S) to (N, width, *S / stride)."""
        identity = x if self.downsample is None else self.downsample(every_second(x) if self.halves else x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)).add_(identity))  # in place: no backward pass reads the norm's output


class ResNetEncoder(nn.Module):
    """Features of five sizes: the stem's at full size, then four stages, each at half the size before it.

    Args:
        conv: nn.Conv2d or nn.Conv3d.
        norm: makes the normalisation layer for a width.
        in_channels: channels of the image.
    """

    def __init__(self, conv: type[nn.Module], norm: Callable[[int], nn.Module], in_channels: int):
        super().__init__()
        self.conv1 = conv(in_channels, WIDTHS[0], 7, stride=1, padding=3, bias=False)
        self.bn1 = norm(WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        for i, (blocks, width_in, width) in enumerate(zip(BLOCKS_PER_STAGE, WIDTHS, WIDTHS[1:], strict=False), start=1):
            stage = [BasicBlock(conv, norm, width_in, width, stride=2)]
            stage += [BasicBlock(conv, norm, width, width, stride=1) for _ in range(blocks - 1)]
            setattr(self, f"layer{i}", nn.Sequential(*stage))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (N, in_channels, *S) to five feature maps, from 16 channels at S to 256 at S / 16."""
        features = [self.relu(self.bn1(self.conv1(x)))]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            features.append(stage(features[-1]))
        return features
