"""A model with one of every kind of module."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Attention as a user writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Parameter(torch.randn(width, width) / 8)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        q, k, v = self.qkv(x).chunk(3, -1)
        attended: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attended @ self.mix


class Zoo(nn.Module):
    """One of every kind of module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.attention = Attention(64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.depthwise = nn.Conv1d(64, 64, 3, padding="same", groups=64)
        self.conv = nn.Sequential(nn.Conv2d(1, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 1, 1))
        self.lstm = nn.LSTM(64, 40, batch_first=True)
        self.gru = nn.GRU(40, 64, batch_first=True)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [N, T, 50] for ids [N, T]."""
        x = self.encoder(self.attention(self.embed(ids)))
        x = x + self.depthwise(x.mT).mT
        x = x + self.conv(x[:, None])[:, 0]
        x = self.gru(self.lstm(x)[0])[0]
        logits: Tensor = self.head(self.norm(x))
        return logits


IDS = torch.randint(50, (2, 20))


def classes(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]
