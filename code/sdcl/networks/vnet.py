"""The 3D V-Net: first student and teacher on LA and Pancreas."""

from torch import Tensor, nn

from sdcl.networks.layers import Conv3d, InstanceNorm

WIDTHS = (16, 32, 64, 128, 256)
CONVS_DOWN = (1, 2, 3, 3, 3)  # convolutions a stage, from the top
CONVS_UP = (3, 3, 2)  # from the bottom; the last stage, of one, belongs to the head
DROPOUT = 0.5
STAGES_DOWN = ("block_one", "block_two", "block_three", "block_four", "block_five")
STAGES_UP = ("block_six", "block_seven", "block_eight")


def conv_norm_relu(conv: nn.Module, width: int) -> list[nn.Module]:
    """List the three layers that every stage repeats: a convolution, InstanceNorm without affine, ReLU."""
    return [conv, InstanceNorm(width), nn.ReLU(inplace=True)]


class Stage(nn.Module):
    """Several 3x3x3 convolutions of one width, each with norm and ReLU."""

    def __init__(self, convs: int, width_in: int, width: int):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(convs):
            layers += conv_norm_relu(Conv3d(width if i else width_in, width, 3, padding=1), width)
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width_in, *S) to (N, width, *S)."""
        return self.conv(x)


class Resample(nn.Module):
    """Halve or double the size by a 2x2x2 (transposed) convolution of stride 2, with norm and ReLU."""

    def __init__(self, conv: type[nn.Module], width_in: int, width: int):
        super().__init__()
        self.conv = nn.Sequential(*conv_norm_relu(conv(width_in, width, 2, stride=2), width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width_in, *S) to (N, width, *S / 2) or (N, width, *S * 2)."""
        return self.conv(x)


class Head(nn.Sequential):
    """A convolution with norm and ReLU, Dropout3d, a 1x1x1 convolution to the classes."""

    def __init__(self, width: int, num_classes: int):
        super().__init__(Stage(1, width, width), nn.Dropout3d(DROPOUT, inplace=True), nn.Conv3d(width, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width, *S) to logits (N, C, *S)."""
        stage, dropout, to_classes = self
        conv, norm, relu = stage.conv
        # Dropout multiplies channels by 0 or 2, so it may as well come before the ReLU, where it can work in place: one
        # full-size tensor less waits for the backward pass.
        return to_classes(relu(dropout(norm(conv(x)))))


class VNetDecoder(nn.Module):
    """From five feature maps to logits, each skip added to the upsampled features; shared with ResVNet."""

    def add_decoder(self, num_classes: int) -> None:
        """Register the decoder's layers; called after the encoder's, so that parameters keep the published order."""
        self.block_five_up = Resample(nn.ConvTranspose3d, WIDTHS[4], WIDTHS[3])
        for i, (name, convs) in enumerate(zip(STAGES_UP, CONVS_UP, strict=True)):
            width = WIDTHS[3 - i]
            setattr(self, name, Stage(convs, width, width))
            setattr(self, f"{name}_up", Resample(nn.ConvTranspose3d, width, width // 2))
        self.branchs = nn.ModuleList([Head(WIDTHS[0], num_classes)])  # the published checkpoints' spelling

    def decode(self, features: list[Tensor]) -> Tensor:
        """Map the feature maps, full size first, to logits (N, C, *S)."""
        *skips, x = features
        x = self.block_five_up(x) + skips[3]
        x = self.block_six_up(self.block_six(x)) + skips[2]
        x = self.block_seven_up(self.block_seven(x)) + skips[1]
        x = self.block_eight_up(self.block_eight(x)) + skips[0]
        return self.branchs[0](x)


class VNet(VNetDecoder):
    """V-Net with 16 filters at full size and additive skips."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        widths_in = (in_channels, *WIDTHS[1:])
        for i, name in enumerate(STAGES_DOWN):
            setattr(self, name, Stage(CONVS_DOWN[i], widths_in[i], WIDTHS[i]))
            if i < len(WIDTHS) - 1:
                setattr(self, f"{name}_dw", Resample(nn.Conv3d, WIDTHS[i], WIDTHS[i + 1]))
        self.dropout = nn.Dropout3d(DROPOUT)
        self.add_decoder(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, X, Y, Z) to logits (N, C, X, Y, Z); every side is a multiple of 16."""
        features = [self.block_one(x)]
        features.append(self.block_two(self.block_one_dw(features[-1])))
        features.append(self.block_three(self.block_two_dw(features[-1])))
        features.append(self.block_four(self.block_three_dw(features[-1])))
        features.append(self.dropout(self.block_five(self.block_four_dw(features[-1]))))
        return self.decode(features)
