"""KWT-1, the smallest Keyword Transformer (arXiv 2104.00769): a post-norm ViT over time steps.

Names of modules are those of the checkpoint `kwt1-speech-commands/model.safetensors`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FRAMES, COEFFICIENTS, WIDTH, HIDDEN, BLOCKS, CLASSES = 98, 40, 64, 256, 12, 12
EPSILON = 1e-6


class Attention(nn.Module):
    """One head as wide as the model; no bias on queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v = nn.Linear(WIDTH, WIDTH, bias=False)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over [batch, steps, width]."""
        mixed = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        projected: Tensor = self.proj(mixed)
        return projected


class Perceptron(nn.Module):
    """Two layers with GELU in its tanh form between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to [..., width]."""
        mapped: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return mapped


class Block(nn.Module):
    """Attention and perceptron, each followed by a normalisation of the sum (post-norm)."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.mlp = Perceptron()
        self.norm1 = nn.LayerNorm(WIDTH, eps=EPSILON)
        self.norm2 = nn.LayerNorm(WIDTH, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, steps, width] to the same shape."""
        x = self.norm1(x + self.attn(x))
        normed: Tensor = self.norm2(x + self.mlp(x))
        return normed


class KeywordTransformer(nn.Module):
    """Features [clips, 98, 40] to logits [clips, 12], read from the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(COEFFICIENTS, WIDTH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, FRAMES + 1, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        """Classify clips."""
        start = self.cls_token.expand(len(features), -1, -1)
        x = torch.cat([start, self.embed(features)], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x[:, 0])
        return logits
