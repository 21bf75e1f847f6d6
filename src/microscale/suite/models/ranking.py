"""Neural collaborative filtering (arXiv 1708.05031): GMF and MLP, fused as before fine-tuning.

Names of modules are those of the checkpoint `ncf-ml1m/model.safetensors`.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microscale.suite.models.checkpoint import fit, read_tensors

USERS, ITEMS = 6040, 3706
FACTORS, WIDTH = 8, 32


class Factorization(nn.Module):
    """GMF: a weighted product of the factors of user and item."""

    def __init__(self) -> None:
        super().__init__()
        self.user_embedding = nn.Embedding(USERS, FACTORS)
        self.item_embedding = nn.Embedding(ITEMS, FACTORS)
        self.prediction = nn.Linear(FACTORS, 1)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Score pairs [...]."""
        both = self.user_embedding(users) * self.item_embedding(items)
        scores: Tensor = self.prediction(both).squeeze(-1)
        return scores


class Perceptron(nn.Module):
    """Three layers over the vectors of user and item side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.user_embedding = nn.Embedding(USERS, WIDTH)
        self.item_embedding = nn.Embedding(ITEMS, WIDTH)
        self.layer1 = nn.Linear(2 * WIDTH, 32)
        self.layer2 = nn.Linear(32, 16)
        self.layer3 = nn.Linear(16, 8)
        self.prediction = nn.Linear(8, 1)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Score pairs [...]."""
        x = torch.cat([self.user_embedding(users), self.item_embedding(items)], -1)
        for layer in (self.layer1, self.layer2, self.layer3):
            x = F.relu(layer(x))
        scores: Tensor = self.prediction(x).squeeze(-1)
        return scores


class CollaborativeFilter(nn.Module):
    """Users and items, ids [...] each, to scores [...]: half GMF's, half the perceptron's."""

    def __init__(self) -> None:
        super().__init__()
        self.gmf = Factorization()
        self.mlp = Perceptron()

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Score pairs."""
        scores: Tensor = (self.gmf(users, items) + self.mlp(users, items)) / 2
        return scores


def load(folder: Path) -> CollaborativeFilter:
    """The model with the weights of `folder`."""
    path = folder / "model.safetensors"
    model = CollaborativeFilter()
    fit(model, read_tensors(path), path)
    return model.eval()
