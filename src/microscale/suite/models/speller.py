"""The GRU encoder-decoder of g2p_en: letters to phonemes, greedy, without attention.

The checkpoint is `g2p-gru/model.safetensors`; its equations are those of `torch.nn.GRU`.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from microscale.suite.models.checkpoint import expect, read_tensors

LETTERS, PHONEMES, WIDTH = 29, 74, 256
START, END = 2, 3
LONGEST = 20
"""Symbols after which a pronunciation is cut."""


class Encoder(nn.Module):
    """Letter ids [words, letters] to the last state [1, words, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LETTERS, WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, letters: Tensor) -> Tensor:
        """Read words of the same length."""
        _, state = self.gru(self.embedding(letters))
        return torch.as_tensor(state)


class Decoder(nn.Module):
    """Phoneme ids [words, steps] and a state to logits [words, steps, 74] and the next state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(PHONEMES, WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.output = nn.Linear(WIDTH, PHONEMES)

    def forward(self, phonemes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Predict each next phoneme."""
        hidden, state = self.gru(self.embedding(phonemes), state)
        return self.output(hidden), state


class Speller(nn.Module):
    """Letters [words, letters] and the phonemes before each [words, steps] to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder()

    def forward(self, letters: Tensor, phonemes: Tensor) -> Tensor:
        """Logits [words, steps, 74] of each next phoneme, given those before it."""
        logits, _ = self.decoder(phonemes, self.encoder(letters))
        return torch.as_tensor(logits)

    def pronounce(self, letters: Tensor) -> Tensor:
        """The likeliest phoneme at every step: ids [words, 20], to be read up to `END`."""
        state = self.encoder(letters)
        last = letters.new_full((len(letters), 1), START)
        found: list[Tensor] = []
        for _ in range(LONGEST):
            logits, state = self.decoder(last, state)
            last = logits.argmax(-1)
            found.append(last)
        return torch.cat(found, 1)


def load(folder: Path) -> Speller:
    """The model with the weights of `folder`."""
    path = folder / "model.safetensors"
    tensors, model = read_tensors(path), Speller()
    # PyTorch's layer adds the number of the layer to each name.
    state = model.state_dict()
    wanted = {name.removesuffix("_l0"): tuple(tensor.shape) for name, tensor in state.items()}
    expect(tensors, wanted, path, "Speller")
    model.load_state_dict({name: tensors[name.removesuffix("_l0")] for name in state})
    return model.eval()
