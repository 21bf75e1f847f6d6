"""ResNet-8 for CIFAR-10 of MLPerf Tiny, batch norm folded into the convolutions.

Names of modules are those of the checkpoints `mlperf-tiny-resnet8/resnet8*.safetensors`.
"""

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from microscale.suite.models.checkpoint import fit, named, read_tensors
from microscale.suite.models.padding import pad_same

CLASSES = 10


class Stage(nn.Module):
    """Two convolutions beside the identity, or beside a 1x1 convolution where the size changes."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride)
        self.conv2 = nn.Conv2d(after, after, 3)
        self.skip = None if stride == 1 else nn.Conv2d(before, after, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [images, before, height, width]."""
        inner = F.relu(self.conv1(pad_same(x, self.conv1)))
        inner = self.conv2(pad_same(inner, self.conv2))
        return F.relu(inner + (x if self.skip is None else self.skip(x)))


class ResNet8(nn.Module):
    """Images [images, 3, 32, 32] of values 0..255 to logits [images, 10]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3)
        self.s1 = Stage(channels, channels)
        self.s2 = Stage(channels, 2 * channels)
        self.s3 = Stage(2 * channels, 4 * channels)
        self.fc = nn.Linear(4 * channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        x = F.relu(self.stem(pad_same(x, self.stem)))
        x = self.s3(self.s2(self.s1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def load(folder: Path, name: str) -> ResNet8:
    """The model `name` (resnet8 or resnet8_large) with the weights of `folder`."""
    path = folder / f"{name}.safetensors"
    tensors = read_tensors(path)
    (bias,) = named(tensors, ["stem.bias"], path)
    model = ResNet8(bias.numel())
    fit(model, tensors, path)
    return model.eval()
