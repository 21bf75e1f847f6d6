"""RNN, GRU, LSTM and their cells: PyTorch's functions, on cast operands, packed sequences too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import microscale.weights as weights_module
from layer_checks import assert_products, assert_same_function, converted, doubles, tensors
from microscale.checkpoint.native import load, save
from microscale.convert import convert
from microscale.errors import MicroscaleError
from microscale.ledger import record_products
from microscale.tensor import BlockTensor

LAYERS: list[Any] = [nn.LSTM, nn.GRU, nn.RNN]
CELLS: list[Any] = [nn.LSTMCell, nn.GRUCell, nn.RNNCell]


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts that change nothing."""

    def unchanged(x: Tensor, *_: object, **__: object) -> Tensor:
        return x * 1

    monkeypatch.setattr(weights_module, "cast", unchanged)


def state(layer: nn.RNNBase, *batch: int) -> Any:
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    h = doubles(rows, *batch, layer.proj_size or layer.hidden_size)
    return (h, doubles(rows, *batch, layer.hidden_size)) if layer.mode == "LSTM" else h


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 3, "bidirectional": True},
    {"num_layers": 2, "bias": False, "batch_first": True},
    {"bidirectional": True, "batch_first": True},
]


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("options", [*OPTIONS, {"nonlinearity": "relu"}], ids=str)
@pytest.mark.parametrize("kind", LAYERS[1:])
def test_layers_are_torchs(kind: Any, options: dict[str, Any], batch: bool, given: bool) -> None:
    if kind is nn.GRU and "nonlinearity" in options:
        options = {}
    layer = kind(6, 10, **options).double()
    x = doubles(3, 4, 6) if batch else doubles(4, 6)
    n = (x.shape[0] if layer.batch_first else x.shape[1],) if batch else ()
    h = state(layer, *n)
    assert_same_function(layer, lambda m: m(x, h) if given else m(x))


LENGTHS = [3, 5, 1, 5]


def packed(*, ordered: bool) -> PackedSequence:
    lengths = sorted(LENGTHS, reverse=True) if ordered else LENGTHS
    x = torch.randn(5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=ordered)


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("options", [*OPTIONS, {"proj_size": 4, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences_are_torchs(
    kind: Any, options: dict[str, Any], given: bool, ordered: bool
) -> None:
    if kind is not nn.LSTM and "proj_size" in options:
        options = {"bidirectional": True}
    layer, x = kind(6, 10, **options).double(), packed(ordered=ordered)
    h = state(layer, 4)

    def call(m: nn.Module) -> Any:
        output, final = m(x, h) if given else m(x)
        assert torch.equal(output.batch_sizes, x.batch_sizes)
        return output.data, final

    assert_same_function(layer, call)


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_is_between_layers_in_training_alone(kind: Any) -> None:
    layer, x = kind(6, 10, num_layers=2, dropout=0.5).double(), doubles(3, 4, 6)
    assert_same_function(layer.eval(), lambda m: m(x))
    twin = converted(layer.train())
    assert not torch.equal(twin(x)[0], twin(x)[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_multiply_cast_operands(kind: Any) -> None:
    layer = kind(40, 48, num_layers=2, bidirectional=True)
    x = torch.randn(5, 2, 40)
    assert assert_products(layer, lambda m: m(x)) == 4 * (1 + 5)
    sequences = pack_sequence([torch.randn(n, 40) for n in (5, 3)])
    assert assert_products(layer, lambda m: m(sequences)) == 4 * (1 + 5)


def test_a_packed_sequence_computes_what_its_sequences_do() -> None:
    parts = [torch.randn(n, 40) for n in (5, 3, 4)]
    layer = nn.GRU(40, 48, bidirectional=True)
    convert(layer, "mxfp4", verbose=False)
    _, final = layer(pack_sequence(parts, enforce_sorted=False))
    for i, part in enumerate(parts):
        torch.testing.assert_close(final[:, i], layer(part)[1])


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_are_torchs(kind: Any, bias: bool, batch: bool, given: bool) -> None:
    layer = kind(6, 10, bias=bias).double()
    n = (3,) if batch else ()
    x, h = doubles(*n, 6), doubles(*n, 10)
    hx: Any = (h, doubles(*n, 10)) if kind is nn.LSTMCell else h
    assert_same_function(layer, lambda m: m(x, hx) if given else m(x))


@pytest.mark.usefixtures("identity")
def test_cells_have_both_nonlinearities() -> None:
    x = doubles(3, 6)
    assert_same_function(nn.RNNCell(6, 10, nonlinearity="relu").double(), lambda m: m(x))


@pytest.mark.parametrize("kind", CELLS)
def test_cells_multiply_cast_operands(kind: Any) -> None:
    layer, x = kind(40, 48), torch.randn(3, 40)
    assert assert_products(layer, lambda m: m(x)) == 2
    assert "mxfp4/mxfp6_e2m3" in repr(converted(layer))


@pytest.mark.parametrize("kind", CELLS)
def test_cells_refuse_states_that_do_not_fit(kind: Any) -> None:
    layer, h = converted(kind(6, 10)), torch.zeros(1, 10)
    hx: Any = (h, h) if kind is nn.LSTMCell else h
    with pytest.raises(MicroscaleError, match=r"state of shape \(1, 10\); .* it has \(3, 10\)"):
        layer(torch.zeros(3, 6), hx)


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN])
def test_layers_refuse_states_that_do_not_fit(kind: Any) -> None:
    layer = converted(kind(6, 10))
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        layer(torch.zeros(3, 2, 6), torch.zeros(1, 3, 10))


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_subclasses_run_on_cast_operands(kind: Any) -> None:
    class Mine(kind):  # type: ignore[misc]
        """A subclass, which ends in PyTorch's own forward."""

    torch.manual_seed(0)
    layer, mine = kind(40, 48), Mine(40, 48)
    mine.load_state_dict(layer.state_dict())
    x = torch.randn(3, 40)
    twin, other = converted(layer), converted(mine)
    with record_products() as ledger, torch.no_grad():
        for got, expected in zip(tensors(other(x)), tensors(twin(x)), strict=True):
            assert torch.equal(got, expected)
    assert {row.how for row in ledger} == {"emulated"}
    assert len(ledger) == 1


@pytest.mark.parametrize("kind", LAYERS)
def test_subclasses_run_packed_sequences(kind: Any) -> None:
    class Mine(kind):  # type: ignore[misc]
        """A subclass, which ends in PyTorch's own forward."""

    options = {"bidirectional": True, "num_layers": 2, "batch_first": True}
    layer, mine = kind(40, 48, **options), Mine(40, 48, **options)
    mine.load_state_dict(layer.state_dict())
    x, padded = pack_sequence([torch.randn(n, 40) for n in (5, 3)]), torch.randn(2, 5, 40)
    for given in (x, padded):
        with torch.no_grad():
            twin, other = converted(layer)(given), converted(mine)(given)
        for got, expected in zip(tensors(other[1]), tensors(twin[1]), strict=True):
            assert torch.equal(got, expected)


class Stack(nn.Module):
    """One of each."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(32, 64, bidirectional=True)
        self.rnn = nn.RNN(128, 32)
        self.cells = nn.ModuleList([nn.GRUCell(32, 32), nn.RNNCell(32, 32)])
        self.cell = nn.LSTMCell(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        """Two states [N, 32] of sequences [T, N, 32]."""
        x = self.rnn(self.gru(x)[0])[0][-1]
        for cell in self.cells:
            x = cell(x)
        h: Tensor = self.cell(x)[0]
        return h


@pytest.mark.parametrize("spelling", ["mxfp4/mxfp6_e2m3", "int8-channel/int8-token"])
def test_layers_come_back_from_files(spelling: str, tmp_path: Path) -> None:
    model, fresh, x = Stack(), Stack(), torch.randn(4, 2, 32)
    assert convert(model, spelling, verbose=False).left == ()
    with torch.no_grad():
        expected = model(x)
        save(model, tmp_path / "m.safetensors")
        stored = load(tmp_path / "m.safetensors", fresh)
        with record_products() as ledger:
            assert torch.equal(fresh(x), expected)
    assert {row.how for row in ledger} == {"packed"}
    assert all(isinstance(t, BlockTensor) for name, t in stored.items() if "weight" in name)


def test_gradients_reach_every_weight() -> None:
    model = Stack()
    convert(model, "mxfp4", verbose=False)
    model(torch.randn(4, 2, 32)).square().sum().backward()
    # Cells begin with zeros, which give their w_hh no gradient.
    assert all(p.grad is not None for p in model.parameters())
    layers = *model.gru.parameters(), *model.rnn.parameters()
    assert all(p.grad is not None and p.grad.any() for p in layers)
