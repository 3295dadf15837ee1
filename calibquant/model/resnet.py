"""ResNet, ResNeXt and Wide ResNet with torchvision's parameter names (He et al. 2016).

Written so that dataflow is explicit: a block lists its convolution-batch-norm pairs in the order in
which they run, and both the float forward here and the quantized network follow that list.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

ConvBN = tuple[nn.Conv2d, nn.BatchNorm2d]


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Convolution without bias whose padding keeps the size at stride 1."""
    return nn.Conv2d(
        in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )


@dataclass(frozen=True)
class Architecture:
    """One row of the ResNet table.

    Attributes:
        bottleneck: three-convolution blocks, else two-convolution ones.
        depths: blocks in each of the four stages.
        groups, width_per_group: of the 3x3 convolution of a bottleneck.
    """

    bottleneck: bool
    depths: tuple[int, int, int, int]
    groups: int = 1
    width_per_group: int = 64


ARCHITECTURES = {
    "resnet18": Architecture(False, (2, 2, 2, 2)),
    "resnet34": Architecture(False, (3, 4, 6, 3)),
    "resnet50": Architecture(True, (3, 4, 6, 3)),
    "resnet101": Architecture(True, (3, 4, 23, 3)),
    "resnet152": Architecture(True, (3, 8, 36, 3)),
    "resnext50_32x4d": Architecture(True, (3, 4, 6, 3), 32, 4),
    "resnext101_32x8d": Architecture(True, (3, 4, 23, 3), 32, 8),
    "wide_resnet50_2": Architecture(True, (3, 4, 6, 3), 1, 128),
    "wide_resnet101_2": Architecture(True, (3, 4, 23, 3), 1, 128),
}


class ResidualBlock(nn.Module, ABC):
    """A branch of convolutions added to a shortcut, then a ReLU."""

    expansion: int
    """Output channels over planes."""
    downsample: nn.Sequential | None

    @abstractmethod
    def branch(self) -> list[tuple[str, ConvBN]]:
        """Named convolution-batch-norm pairs of the branch, in dataflow order."""

    def shortcut(self) -> ConvBN | None:
        """The projection on the shortcut, or None where it is the identity."""
        if self.downsample is None:
            return None
        projection, norm = self.downsample
        assert isinstance(projection, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        return projection, norm

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        *inner, (_, last) = self.branch()
        for _, (convolution, norm) in inner:
            x = F.relu(norm(convolution(x)))
        convolution, norm = last
        return F.relu(norm(convolution(x)) + residual)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions (ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(in_channels, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.downsample = _projection(in_channels, planes, stride)

    def branch(self) -> list[tuple[str, ConvBN]]:
        return [("conv1", (self.conv1, self.bn1)), ("conv2", (self.conv2, self.bn2))]


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions; ``stride_in_1x1`` puts the stride on the first, as MSRA did."""

    expansion = 4

    def __init__(
        self, in_channels: int, planes: int, stride: int, width: int, groups: int, stride_in_1x1: bool
    ) -> None:
        super().__init__()
        out_channels = planes * self.expansion
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1, self.bn1 = conv(in_channels, width, 1, first), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, second, groups), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, out_channels, 1), nn.BatchNorm2d(out_channels)
        self.downsample = _projection(in_channels, out_channels, stride)

    def branch(self) -> list[tuple[str, ConvBN]]:
        return [
            ("conv1", (self.conv1, self.bn1)),
            ("conv2", (self.conv2, self.bn2)),
            ("conv3", (self.conv3, self.bn3)),
        ]


class ResNet(nn.Module):
    """A residual network: stem, four stages of blocks, average pooling and a classifier.

    Args:
        architecture: depths, block type and group widths.
        num_classes: outputs of the classifier.
        stride_in_1x1: the original MSRA placement of a stage's stride in bottlenecks.
        small_images: a 3x3 stem of stride 1 without pooling, for images of about 8 to 64 pixels.
        base_width: channels of the stem and of the first stage's planes (64 in the papers).
    """

    def __init__(
        self,
        architecture: Architecture,
        num_classes: int = 1000,
        stride_in_1x1: bool = False,
        small_images: bool = False,
        base_width: int = 64,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.stride_in_1x1 = stride_in_1x1
        self.conv1 = conv(3, base_width, 3) if small_images else conv(3, base_width, 7, 2)
        self.bn1 = nn.BatchNorm2d(base_width)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, 2, padding=1)
        expansion = Bottleneck.expansion if architecture.bottleneck else BasicBlock.expansion
        planes = [base_width * 2**stage for stage in range(4)]
        depths = architecture.depths
        self.layer1 = self._stage(base_width, planes[0], depths[0], stride=1)
        self.layer2 = self._stage(planes[0] * expansion, planes[1], depths[1], stride=2)
        self.layer3 = self._stage(planes[1] * expansion, planes[2], depths[2], stride=2)
        self.layer4 = self._stage(planes[2] * expansion, planes[3], depths[3], stride=2)
        self.fc = nn.Linear(planes[3] * expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, channels: int, planes: int, depth: int, stride: int) -> nn.Sequential:
        first = self._block(channels, planes, stride)
        channels = planes * first.expansion
        return nn.Sequential(first, *(self._block(channels, planes, 1) for _ in range(depth - 1)))

    def _block(self, channels: int, planes: int, stride: int) -> ResidualBlock:
        if not self.architecture.bottleneck:
            return BasicBlock(channels, planes, stride)
        groups = self.architecture.groups
        width = planes * self.architecture.width_per_group // 64 * groups
        return Bottleneck(channels, planes, stride, width, groups, self.stride_in_1x1)

    def blocks(self) -> list[tuple[str, ResidualBlock]]:
        """Named residual blocks in dataflow order."""
        return [
            (name, module) for name, module in self.named_modules() if isinstance(module, ResidualBlock)
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of images ``[N, 3, H, W]``."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits
