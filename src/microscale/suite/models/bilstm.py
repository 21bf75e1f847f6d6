"""Bidirectional LSTMs with CTC for transliteration (arXiv 1610.09565).

The checkpoints are `ar2en-bilstm-ctc/ar2en_*.safetensors`: a matrix for each gate and direction,
whose columns are bias, input, hidden state.
"""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from microscale.suite.models.checkpoint import expect, read_tensors
from microscale.suite.models.recurrent import lstm_state

INPUTS, CLASSES = 48, 40
UNITS = {"ar2en_1layer": (105,), "ar2en_2layers": (130, 105)}
"""Units each way of the layers of each checkpoint."""

GATES = "ifco"
DIRECTIONS = {"fwd": "l0", "bwd": "l0_reverse"}
"""The checkpoint's names, and the suffixes of PyTorch's."""


class BidirectionalLSTM(nn.Module):
    """Vectors [words, steps, 48] to scores [words, steps, 40], class 0 being the blank."""

    def __init__(self, units: tuple[int, ...]) -> None:
        super().__init__()
        widths = (INPUTS, *(2 * n for n in units))
        self.lstm = nn.ModuleList(
            nn.LSTM(before, after // 2, batch_first=True, bidirectional=True)
            for before, after in pairwise(widths)
        )
        self.softmax = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Score every step."""
        for layer in self.lstm:
            x, _ = layer(x)
        scores: Tensor = self.softmax(x)
        return scores


def load(folder: Path, name: str) -> BidirectionalLSTM:
    """The model with the weights of the checkpoint `name`, one of `UNITS`."""
    path, units = folder / f"{name}.safetensors", UNITS[name]
    tensors, model = read_tensors(path), BidirectionalLSTM(units)
    expect(tensors, _shapes(units), path, "BidirectionalLSTM")
    state = {name: tensors[name] for name in ("softmax.weight", "softmax.bias")}
    for layer in range(len(units)):
        for direction, suffix in DIRECTIONS.items():
            gates = [tensors[f"lstm.{layer}.{direction}.{gate}.weight"] for gate in GATES]
            whole = torch.cat(gates)
            inputs = whole.shape[1] - 1 - units[layer]
            parts = lstm_state(suffix, whole[:, 1:], whole[:, 0].contiguous(), inputs)
            state |= {f"lstm.{layer}.{name}": part for name, part in parts.items()}
    model.load_state_dict(state)
    return model.eval()


def _shapes(units: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    widths = (INPUTS, *(2 * n for n in units))
    shapes: dict[str, tuple[int, ...]] = {
        "softmax.weight": (CLASSES, widths[-1]),
        "softmax.bias": (CLASSES,),
    }
    for layer, n in enumerate(units):
        for direction in DIRECTIONS:
            for gate in GATES:
                name = f"lstm.{layer}.{direction}.{gate}.weight"
                shapes[name] = (n, 1 + widths[layer] + n)
    return shapes
