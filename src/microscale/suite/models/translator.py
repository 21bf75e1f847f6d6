"""A pre-norm transformer of OpenNMT-tf, Arabic to English letters: six layers each, eight heads.

Names of modules are those of the checkpoint `aren-transformer/model.safetensors`.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microscale.suite.models.checkpoint import fit, read_tensors

SOURCES, TARGETS, WIDTH, HIDDEN, HEADS, LAYERS = 51, 43, 32, 128, 8, 6
START, END = 1, 2
EPSILON = 1e-6


class SelfAttention(nn.Module):
    """Eight heads of size 4 over the sequence itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(WIDTH, eps=EPSILON)
        self.linear_0 = nn.Linear(WIDTH, 3 * WIDTH)
        self.linear_1 = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        """Attend over [words, steps, width]; `causal`: to earlier steps only."""
        q, k, v = map(_heads, self.linear_0(self.layer_norm(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        projected: Tensor = self.linear_1(_joined(mixed))
        return projected


class CrossAttention(nn.Module):
    """Eight heads of size 4 from the target over the source."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(WIDTH, eps=EPSILON)
        self.linear_0 = nn.Linear(WIDTH, WIDTH)
        self.linear_1 = nn.Linear(WIDTH, 2 * WIDTH)
        self.linear_2 = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Attend from [words, steps, width] over `source` [words, letters, width]."""
        q = _heads(self.linear_0(self.layer_norm(x)))
        k, v = map(_heads, self.linear_1(source).chunk(2, -1))
        projected: Tensor = self.linear_2(_joined(F.scaled_dot_product_attention(q, k, v)))
        return projected


class FeedForward(nn.Module):
    """Two layers with ReLU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(WIDTH, eps=EPSILON)
        self.linear_0 = nn.Linear(WIDTH, HIDDEN)
        self.linear_1 = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to [..., width]."""
        mapped: Tensor = self.linear_1(F.relu(self.linear_0(self.layer_norm(x))))
        return mapped


class Layer(nn.Module):
    """A layer of the encoder, or with `crossed` of the decoder."""

    def __init__(self, *, crossed: bool) -> None:
        super().__init__()
        self.self_attention = SelfAttention()
        self.attention = CrossAttention() if crossed else None
        self.ffn = FeedForward()

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """Map [words, steps, width] to the same shape."""
        x = x + self.self_attention(x, causal=self.attention is not None)
        if self.attention is not None:
            x = x + self.attention(x, source)
        mapped: Tensor = x + self.ffn(x)
        return mapped


class Stack(nn.Module):
    """Embeddings with positions, six layers, a last normalisation."""

    def __init__(self, symbols: int, *, crossed: bool) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(symbols, WIDTH)
        for index in range(LAYERS):
            self.add_module(f"layer_{index}", Layer(crossed=crossed))
        self.layer_norm = nn.LayerNorm(WIDTH, eps=EPSILON)

    def forward(self, symbols: Tensor, source: Tensor | None = None) -> Tensor:
        """Map ids [words, steps] to [words, steps, width]."""
        x = self.embeddings(symbols) * math.sqrt(WIDTH)
        x = x + positions(symbols.shape[1]).to(x)
        for index in range(LAYERS):
            x = self.get_submodule(f"layer_{index}")(x, source)
        normed: Tensor = self.layer_norm(x)
        return normed


class Translator(nn.Module):
    """Source ids [words, letters] and the target before each step [words, steps] to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Stack(SOURCES, crossed=False)
        self.decoder = Stack(TARGETS, crossed=True)
        self.decoder.add_module("projection", nn.Linear(WIDTH, TARGETS))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits [words, steps, 43] of each next letter; `target` begins with `START`."""
        return self._decode(self.encoder(source), target)

    def _decode(self, encoded: Tensor, target: Tensor) -> Tensor:
        hidden = self.decoder(target, encoded)
        logits: Tensor = self.decoder.get_submodule("projection")(hidden)
        return logits

    def translate(self, source: Tensor, longest: int) -> Tensor:
        """The likeliest letter at every step: ids [words, steps], to be read up to `END`."""
        encoded = self.encoder(source)
        target = source.new_full((len(source), 1), START)
        while target.shape[1] <= longest and not (target == END).any(1).all():
            last = self._decode(encoded, target)[:, -1:]
            target = torch.cat([target, last.argmax(-1)], 1)
        return target[:, 1:]


def positions(steps: int) -> Tensor:
    """Sines, then cosines, of pos * 10000^(-i / 15) for positions from 1: [steps, width]."""
    half = WIDTH // 2
    rates = torch.exp(torch.arange(half) * (-math.log(10000) / (half - 1)))
    angles = torch.arange(1, steps + 1).unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def _heads(x: Tensor) -> Tensor:
    parts: Tensor = x.unflatten(-1, (HEADS, -1))
    return parts.transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def load(folder: Path) -> Translator:
    """The model with the weights of `folder`."""
    path = folder / "model.safetensors"
    model = Translator()
    fit(model, read_tensors(path), path)
    return model.eval()
