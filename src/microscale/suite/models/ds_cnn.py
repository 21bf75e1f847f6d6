"""DS-CNN for keyword spotting (Hello Edge, arXiv 1711.07128): depthwise-separable convolutions.

Names of modules are those of the checkpoints `arm-kws/ds_cnn_*.safetensors`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from microscale.suite.models.padding import pad_same

CLASSES = 12
FIRST_KERNEL = (10, 4)
KERNEL = (3, 3)


@dataclass(frozen=True, slots=True)
class Shape:
    """What one of the models is made of; strides are (time, frequency) by name of the layer."""

    channels: int
    blocks: int
    strides: Mapping[str, tuple[int, int]]
    epsilon: float


class DepthwiseSeparable(nn.Module):
    """A 3x3 convolution of each channel alone, then a 1x1 convolution across channels."""

    def __init__(self, channels: int, stride: tuple[int, int], epsilon: float) -> None:
        super().__init__()
        self.dw = nn.Conv2d(channels, channels, KERNEL, stride=stride, groups=channels)
        self.bn_dw = nn.BatchNorm2d(channels, eps=epsilon)
        self.pw = nn.Conv2d(channels, channels, 1)
        self.bn_pw = nn.BatchNorm2d(channels, eps=epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """Map [clips, channels, time, frequency]."""
        x = F.relu(self.bn_dw(self.dw(pad_same(x, self.dw))))
        return F.relu(self.bn_pw(self.pw(x)))


class DSCNN(nn.Module):
    """Features [clips, 49, 10] to logits [clips, 12]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        first = shape.strides["conv_1"]
        self.conv_1 = nn.Conv2d(1, shape.channels, FIRST_KERNEL, stride=first)
        self.bn_1 = nn.BatchNorm2d(shape.channels, eps=shape.epsilon)
        self.separable = [f"ds_{index + 1}" for index in range(shape.blocks)]
        for name in self.separable:
            block = DepthwiseSeparable(shape.channels, shape.strides[name], shape.epsilon)
            self.add_module(name, block)
        self.fc = nn.Linear(shape.channels, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        """Classify clips."""
        x = features.unsqueeze(1)
        x = F.relu(self.bn_1(self.conv_1(pad_same(x, self.conv_1))))
        for name in self.separable:
            x = self.get_submodule(name)(x)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits
