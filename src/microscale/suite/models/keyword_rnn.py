"""The recurrent networks of Hello Edge (arXiv 1711.07128): features [clips, 49, 10] to 12 logits.

The checkpoints are `arm-kws/lstm_l.safetensors` and `gru_l.safetensors`. Neither cell is PyTorch's:
the LSTM has peepholes beside its projection, the GRU resets the state before its product. So their
products are linear layers here: one of the input for all steps, one of the state at each.
TensorFlow multiplies both side by side; apart, no block mixes features with states.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from microscale.suite.models.checkpoint import expect, read_tensors

COEFFICIENTS, CLASSES = 10, 12
CELLS, PROJECTED = 500, 188
GRU_UNITS = 400
FORGET_BIAS = 1.0


class KeywordLSTM(nn.Module):
    """One layer of 500 cells with peepholes, projected to 188."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel_x = nn.Linear(COEFFICIENTS, 4 * CELLS)
        self.kernel_h = nn.Linear(PROJECTED, 4 * CELLS, bias=False)
        self.proj = nn.Linear(CELLS, PROJECTED, bias=False)
        self.peep_i = nn.Parameter(torch.zeros(CELLS))
        self.peep_f = nn.Parameter(torch.zeros(CELLS))
        self.peep_o = nn.Parameter(torch.zeros(CELLS))
        self.fc = nn.Linear(PROJECTED, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        """Classify clips by the state after the last frame."""
        h = features.new_zeros(len(features), PROJECTED)
        c = features.new_zeros(len(features), CELLS)
        for given in self.kernel_x(features).unbind(1):
            i, g, f, o = (given + self.kernel_h(h)).chunk(4, -1)
            kept = (f + FORGET_BIAS + self.peep_f * c).sigmoid() * c
            c = kept + (i + self.peep_i * c).sigmoid() * g.tanh()
            h = self.proj((o + self.peep_o * c).sigmoid() * c.tanh())
        logits: Tensor = self.fc(h)
        return logits


class KeywordGRU(nn.Module):
    """One layer of 400 units."""

    def __init__(self) -> None:
        super().__init__()
        self.gates_x = nn.Linear(COEFFICIENTS, 2 * GRU_UNITS)
        self.gates_h = nn.Linear(GRU_UNITS, 2 * GRU_UNITS, bias=False)
        self.candidate_x = nn.Linear(COEFFICIENTS, GRU_UNITS)
        self.candidate_h = nn.Linear(GRU_UNITS, GRU_UNITS, bias=False)
        self.fc = nn.Linear(GRU_UNITS, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        """Classify clips by the state after the last frame."""
        h = features.new_zeros(len(features), GRU_UNITS)
        gates, candidates = self.gates_x(features), self.candidate_x(features)
        for gate, candidate in zip(gates.unbind(1), candidates.unbind(1), strict=True):
            r, u = (gate + self.gates_h(h)).sigmoid().chunk(2, -1)
            new = (candidate + self.candidate_h(r * h)).tanh()
            h = u * h + (1 - u) * new
        logits: Tensor = self.fc(h)
        return logits


def load_lstm(folder: Path) -> KeywordLSTM:
    """LSTM_L with the weights of `folder`."""
    path = folder / "lstm_l.safetensors"
    tensors, model = read_tensors(path), KeywordLSTM()
    peepholes = ("lstm.peep_i", "lstm.peep_f", "lstm.peep_o")
    wanted: dict[str, tuple[int, ...]] = {
        "lstm.kernel": (4 * CELLS, COEFFICIENTS + PROJECTED),
        "lstm.bias": (4 * CELLS,),
        "lstm.proj": (PROJECTED, CELLS),
        **dict.fromkeys(peepholes, (CELLS,)),
        **_head(PROJECTED),
    }
    expect(tensors, wanted, path, "KeywordLSTM")
    state = {name.removeprefix("lstm."): tensors[name] for name in peepholes}
    state |= {"proj.weight": tensors["lstm.proj"]}
    state |= _apart("kernel", tensors["lstm.kernel"], tensors["lstm.bias"])
    state |= {name: tensors[name] for name in _head(PROJECTED)}
    model.load_state_dict(state)
    return model.eval()


def load_gru(folder: Path) -> KeywordGRU:
    """GRU_L with the weights of `folder`."""
    path = folder / "gru_l.safetensors"
    tensors, model = read_tensors(path), KeywordGRU()
    rows = {"gates": 2 * GRU_UNITS, "candidate": GRU_UNITS}
    wanted = _head(GRU_UNITS)
    for name, count in rows.items():
        wanted[f"gru.{name}.weight"] = (count, COEFFICIENTS + GRU_UNITS)
        wanted[f"gru.{name}.bias"] = (count,)
    expect(tensors, wanted, path, "KeywordGRU")
    state = {name: tensors[name] for name in _head(GRU_UNITS)}
    for name in rows:
        state |= _apart(name, tensors[f"gru.{name}.weight"], tensors[f"gru.{name}.bias"])
    model.load_state_dict(state)
    return model.eval()


def _head(width: int) -> dict[str, tuple[int, ...]]:
    return {"fc.weight": (CLASSES, width), "fc.bias": (CLASSES,)}


def _apart(name: str, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Part a matrix of [input, state] into the two layers here."""
    return {
        f"{name}_x.weight": weight[:, :COEFFICIENTS].contiguous(),
        f"{name}_x.bias": bias,
        f"{name}_h.weight": weight[:, COEFFICIENTS:].contiguous(),
    }
