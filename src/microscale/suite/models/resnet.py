"""ResNet-20, -32, -44 and -56 for CIFAR-10 (arXiv 1512.03385).

Names of modules are those of the checkpoints `resnet-cifar10/resnet*.safetensors`.
"""

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from microscale.suite.models.checkpoint import fit, read_tensors

CHANNELS, CLASSES = (16, 32, 64), 10
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of RGB in 0..1, as the training had them."""


class Block(nn.Module):
    """Two convolutions beside a shortcut without weights."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride = stride
        self.added = after - before

    def forward(self, x: Tensor) -> Tensor:
        """Map [images, before, height, width]."""
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added:
            side = self.added // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, side, side))
        return F.relu(inner + x)


class ResNet(nn.Module):
    """Normalised images [images, 3, 32, 32] to logits [images, 10]; `blocks` in each stage."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, CHANNELS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS[0])
        self.layer1 = _stage(CHANNELS[0], CHANNELS[0], blocks)
        self.layer2 = _stage(CHANNELS[0], CHANNELS[1], blocks)
        self.layer3 = _stage(CHANNELS[1], CHANNELS[2], blocks)
        self.linear = nn.Linear(CHANNELS[2], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def _stage(before: int, after: int, blocks: int) -> nn.Sequential:
    first = Block(before, after, 1 if before == after else 2)
    return nn.Sequential(first, *(Block(after, after, 1) for _ in range(blocks - 1)))


def load(folder: Path, depth: int) -> ResNet:
    """ResNet-20, -32, -44 or -56 with the weights of `folder`."""
    path = folder / f"resnet{depth}.safetensors"
    model = ResNet((depth - 2) // 6)
    fit(model, read_tensors(path), path)
    return model.eval()
