"""A small GPT: learned positions, pre-norm blocks, tied output. Everything `torch.nn` has is used.

Sizes are named by their parameters without embeddings, about 12 layers x width^2. The paper
(2310.10537) gives the names 20M to 1.5B but no shapes; those below are this package's, with heads
of 64 (32 below 10M) and, for the largest, GPT-2 XL's shape.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Size:
    """Layers, width and heads of a GPT, and the learning rate that suits them."""

    layers: int
    width: int
    heads: int
    learning_rate: float

    def block_parameters(self) -> int:
        """The number of parameters without embeddings and the last norm: Kaplan's N."""
        return self.layers * (12 * self.width**2 + 13 * self.width)

    def parameters(self, vocabulary: int, context: int) -> int:
        """The number of all parameters; the output layer is the embedding table."""
        return self.block_parameters() + (vocabulary + context + 2) * self.width


SIZES = {
    "0.5M": Size(4, 96, 3, 2e-3),
    "1M": Size(5, 128, 4, 2e-3),
    "3M": Size(4, 256, 8, 1e-3),
    "10M": Size(6, 384, 6, 1e-3),
    "20M": Size(6, 512, 8, 1e-3),
    "150M": Size(12, 1024, 16, 6e-4),
    "300M": Size(24, 1024, 16, 3e-4),
    "1.5B": Size(48, 1600, 25, 2e-4),
}
"""The learning rates are those usual for float32 at these sizes; none was tuned for a format."""


class Block(nn.Module):
    """Attention and a perceptron, each after a norm and added to what came in."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention_norm = nn.LayerNorm(size.width)
        self.query_key_value = nn.Linear(size.width, 3 * size.width)
        self.attention_out = nn.Linear(size.width, size.width)
        self.perceptron_norm = nn.LayerNorm(size.width)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, time, width] to the same shape; a place sees itself and what is before it."""
        batch, time, width = x.shape
        merged = self.query_key_value(self.attention_norm(x))
        heads = merged.view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(x.shape))
        result: Tensor = x + self.down(F.gelu(self.up(self.perceptron_norm(x)), approximate="tanh"))
        return result


class GPT(nn.Module):
    """Tokens [batch, time] to logits [batch, time, vocabulary]."""

    def __init__(
        self, size: Size, vocabulary: int, context: int, *, checkpointing: bool = False
    ) -> None:
        """Make one with random weights, as GPT-2 draws them; `checkpointing` recomputes blocks."""
        super().__init__()
        self.size, self.context, self.checkpointing = size, context, checkpointing
        self.tokens = nn.Embedding(vocabulary, size.width)
        self.positions = nn.Embedding(context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self._draw()

    def _draw(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # What is added to the residual grows with depth otherwise.
                deep = name.endswith(("attention_out.weight", "down.weight"))
                nn.init.normal_(
                    parameter, std=0.02 / ((2 * self.size.layers) ** 0.5 if deep else 1)
                )
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits of what comes after each token; at most `context` of them."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    @torch.no_grad()
    def generate(self, prompt: list[int], count: int, generator: torch.Generator) -> list[int]:
        """Continue a prompt by `count` tokens, drawn from the model's own distribution."""
        device = self.tokens.weight.device
        found = list(prompt)
        for _ in range(count):
            window = torch.tensor([found[-self.context :]], device=device)
            probabilities = self(window)[0, -1].float().softmax(-1).cpu()
            found.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        return found[len(prompt) :]


def loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean negative log-likelihood, in nats a token, of windows [batch, time + 1]."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
