"""Converted models under torch.compile(fullgraph=True): the same bits as eagerly.

The backend "aot_eager" traces everything and compiles nothing, so that no compiler is needed and
bits can be compared.
"""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microscale.convert import convert, revert
from microscale.errors import MicroscaleError
from microscale.ledger import record_products
from microscale.policy import Policy


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Written(nn.Module):
    """Products written as operators, in a module in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(64, 192))
        self.w = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and attend."""
        q, k, v = self.inner(x).chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = attended @ self.w + torch.matmul(attended, self.w.t())
        result: Tensor = torch.bmm(mixed, x.mT) @ x + F.linear(x, self.w)
        return result


class Around(nn.Module):
    """A scope around a scope."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Written(), Written()

    def forward(self, x: Tensor) -> Tensor:
        """Run both, and one product more."""
        result: Tensor = self.second(self.first(x)) @ self.first.w
        return result


class Contracted(nn.Module):
    """Products that are no matmul as they stand."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 4, 16))
        self.form = nn.Bilinear(64, 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Contract four times."""
        heads = torch.einsum("btd,dhk->bhtk", x, self.w)
        scores = torch.einsum("bhtk,bhsk->bhts", heads, heads)
        mixed = torch.tensordot(scores, heads.sum(0), dims=([1, 3], [0, 1]))
        result: Tensor = torch.inner(
            self.form(x, x), torch.addbmm(mixed[0, :3, :3], x[:, :3], x[:, :3].mT)
        )
        return result


class Cell(nn.Module):
    """An LSTM cell, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(64, 48)

    def forward(self, x: Tensor) -> Tensor:
        """Two steps over [2, T, 64]."""
        h: Tensor = self.cell(x[1], self.cell(x[0]))[0]
        return h


def modules() -> dict[str, tuple[nn.Module, Tensor]]:
    x = torch.randn(2, 40, 64)
    encoder = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return {
        "linear": (nn.Linear(64, 7), x),
        "embedding": (nn.Embedding(9, 64), torch.tensor([[1, 2], [3, 8]])),
        "conv1d": (nn.Conv1d(40, 8, 3, padding="same", padding_mode="circular"), x),
        "conv2d": (nn.Conv2d(2, 8, 3, groups=2), x[None]),
        "transformer layer": (encoder.eval(), x),
        "transformer": (nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False).eval(), x),
        "conv_transpose2d": (nn.ConvTranspose2d(2, 6, 3, stride=2, groups=2), x[None]),
        "embedding bag": (nn.EmbeddingBag(9, 64), torch.tensor([[1, 2], [3, 8]])),
        "lstm cell": (Cell(), x),
        "contracted": (Contracted(), x),
        "written": (Written(), x),
        "nested": (Around(), x),
    }


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("name", modules())
@pytest.mark.parametrize("spelling", ["mxfp4/mxfp6_e2m3", "int8-channel/int8-token"])
def test_compiled_modules_give_the_same_bits(name: str, spelling: str) -> None:
    model, x = modules()[name]
    convert(model, spelling, verbose=False)
    with torch.no_grad():
        assert torch.equal(compiled(model)(x), model(x))


class Heads(nn.MultiheadAttention):
    """A subclass, which ends in PyTorch's own forward."""


class Layer(nn.TransformerEncoderLayer):
    """Another."""


@pytest.mark.parametrize("kind", [Heads, Layer])
def test_no_fused_path_goes_around_the_casts_of_subclasses(kind: Any) -> None:
    options = {"dim_feedforward": 128} if kind is Layer else {}
    layer, x = kind(64, 4, batch_first=True, **options).eval(), torch.randn(2, 40, 64)
    inputs = (x,) if kind is Layer else (x, x, x)
    with torch.no_grad():
        plain = layer(*inputs)
        convert(layer, "mxfp4", verbose=False)
        eager, traced = layer(*inputs), compiled(layer)(*inputs)
    first = 0 if kind is Heads else slice(None)
    assert torch.equal(eager[first], traced[first])
    assert not torch.equal(eager[first], plain[first])


def test_attention_with_masks_and_weights() -> None:
    layer, x = nn.MultiheadAttention(64, 4, add_bias_kv=True), torch.randn(40, 2, 64)
    padding = torch.arange(40) > torch.tensor([39, 20])[:, None]
    convert(layer, "mxfp4", verbose=False)
    expected = layer(x, x, x, key_padding_mask=padding)
    got = compiled(layer)(x, x, x, key_padding_mask=padding)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_compiled_gradients_are_the_same() -> None:
    model, x = Around(), torch.randn(2, 40, 64)
    convert(model, "mxfp4", verbose=False)
    grads = []
    for run in (model, compiled(model)):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(list(model.parameters()))
    for eager, traced in zip(*grads, strict=True):
        assert torch.equal(eager, traced)


def test_compiled_models_see_new_weights_and_policies() -> None:
    model, x = Written(), torch.randn(2, 40, 64)
    convert(model, "mxfp4", verbose=False)
    run = compiled(model)
    with torch.no_grad():
        before = run(x)
        model.w.mul_(2)
        assert not torch.equal(run(x), before)
        assert torch.equal(run(x), model(x))
        convert(model, Policy.parse("mxfp8"), verbose=False)
        assert torch.equal(run(x), model(x))
        revert(model)
        assert torch.equal(run(x), model(x))


def test_sizes_may_vary() -> None:
    model = Around()
    convert(model, "mxfp4/mxfp6_e2m3", verbose=False)
    run = compiled(model, dynamic=True)
    with torch.no_grad():
        for length in (40, 41, 64):
            x = torch.randn(2, length, 64)
            assert torch.equal(run(x), model(x))


def test_recurrence_compiles_where_pytorch_lets_it() -> None:
    # Dynamo refuses every nn.LSTM, converted or not, unless it is told otherwise.
    layer, x = nn.LSTM(16, 8, bidirectional=True), torch.randn(3, 2, 16)
    convert(layer, "mxfp4", verbose=False)
    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
        assert torch.equal(compiled(layer)(x)[0], layer(x)[0])


def test_ledgers_see_compiled_models() -> None:
    model, x = Written(), torch.randn(2, 40, 64)
    convert(model, "mxfp4", verbose=False)
    run = compiled(model)
    run(x)
    with record_products() as ledger:
        run(x)
    assert {row.product for row in ledger} == {"linear", "scores", "values", "matmul", "bmm"}
    assert not ledger.skipped


def test_compiled_models_are_not_converted() -> None:
    with pytest.raises(MicroscaleError, match=r"model was made by torch\.compile; convert the"):
        convert(compiled(nn.Linear(8, 8)), "mxfp4", verbose=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Inductor's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_compiles_it_too() -> None:
    model, x = Around(), torch.randn(2, 40, 64)
    convert(model, "mxfp4/mxfp6_e2m3", verbose=False)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected)
