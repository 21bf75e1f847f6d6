"""The introductory network for MNIST, 784-128-32-10.

Names of modules are those of the checkpoint `mnist-mlp/model.safetensors`.
"""

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from microscale.suite.models.checkpoint import fit, read_tensors


class DigitPerceptron(nn.Module):
    """Grey values in 0..1 [images, 784] to logits [images, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(784, 128)
        self.hidden2 = nn.Linear(128, 32)
        self.output = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        logits: Tensor = self.output(F.relu(self.hidden2(F.relu(self.hidden1(x)))))
        return logits


def load(folder: Path) -> DigitPerceptron:
    """The model with the weights of `folder`."""
    path = folder / "model.safetensors"
    model = DigitPerceptron()
    fit(model, read_tensors(path), path)
    return model.eval()
