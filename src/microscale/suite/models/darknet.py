"""Tiny Darknet, an ImageNet classifier of a million parameters.

Names of modules are those of the checkpoint `tiny-darknet-imagenet/model.safetensors`.
"""

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from microscale.suite.models.checkpoint import fit, read_tensors

LAYERS = (
    *((3, 16), (3, 32), (1, 16), (3, 128), (1, 16), (3, 128), (1, 32), (3, 256)),
    *((1, 32), (3, 256), (1, 64), (3, 512), (1, 64), (3, 512), (1, 128), (1, 1000)),
)
"""Kernel and out-channels of each convolution."""

POOLED = (1, 2, 6, 10)
"""Convolutions, counted from 1, after which the picture is halved."""

SLOPE, EPSILON = 0.1, 1e-3


class TinyDarknet(nn.Module):
    """RGB in 0..1 [images, 3, 224, 224] to logits [images, 1000], classes in Darknet's order."""

    def __init__(self) -> None:
        super().__init__()
        before = 3
        for index, (kernel, after) in enumerate(LAYERS, start=1):
            last = index == len(LAYERS)
            conv = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=last)
            self.add_module(f"conv{index}", conv)
            if not last:
                self.add_module(f"bn{index}", nn.BatchNorm2d(after, eps=EPSILON))
            before = after

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        for index in range(1, len(LAYERS)):
            x = self.get_submodule(f"bn{index}")(self.get_submodule(f"conv{index}")(x))
            x = F.leaky_relu(x, SLOPE)
            if index in POOLED:
                x = F.max_pool2d(x, 2)
        scores: Tensor = self.get_submodule(f"conv{len(LAYERS)}")(x)
        return scores.mean((2, 3))


def load(folder: Path) -> TinyDarknet:
    """The model with the weights of `folder`."""
    path = folder / "model.safetensors"
    model = TinyDarknet()
    fit(model, read_tensors(path), path)
    return model.eval()
