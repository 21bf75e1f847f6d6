"""Layers: the same function as PyTorch's, each product on cast operands within its bound.

What a layer does is compared with PyTorch in float64 with casts that change nothing; what it
multiplies is seen below autograd, with real casts, and held against float64.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microscale.weights as weights_module
from layer_checks import (
    SPELLING,
    assert_products,
    assert_same_function,
    converted,
    doubles,
    tensors,
)
from microscale.convert import convert
from microscale.errors import MicroscaleError
from microscale.ledger import record_products
from microscale.policy import Policy
from microscale.tensor import quantize


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts that change nothing."""

    def unchanged(x: Tensor, *_: object, **__: object) -> Tensor:
        return x * 1

    monkeypatch.setattr(weights_module, "cast", unchanged)


# ---------------------------------------------------------------- linear, embedding


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_torchs(bias: bool) -> None:
    x = doubles(3, 50)
    assert_same_function(nn.Linear(50, 7, bias=bias).double(), lambda m: m(x))


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}])
def test_embedding_is_torchs(options: dict[str, Any]) -> None:
    ids = torch.tensor([[1, 2, 2], [0, 9, 1]])
    assert_same_function(nn.Embedding(10, 40, **options).double(), lambda m: m(ids))


def test_linear_multiplies_cast_operands() -> None:
    x = torch.randn(3, 50)
    assert assert_products(nn.Linear(50, 7), lambda m: m(x)) == 1


# ---------------------------------------------------------------- convolutions

CONVOLUTIONS: list[dict[str, Any]] = [
    *({"padding": 2, "padding_mode": m} for m in ("zeros", "reflect", "replicate", "circular")),
    *({"padding": "same", "padding_mode": m, "dilation": 2} for m in ("zeros", "circular")),
    {"padding": "valid", "stride": 2},
    {"groups": 8, "bias": False},
    {"groups": 2, "stride": 2, "dilation": 2, "padding": 1},
]


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_convolutions_are_torchs(options: dict[str, Any]) -> None:
    x = doubles(2, 8, 9, 10)
    assert_same_function(nn.Conv2d(8, 16, 3, **options).double(), lambda m: m(x))
    assert_same_function(nn.Conv1d(8, 16, 3, **options).double(), lambda m: m(x[..., 0]))
    assert_same_function(nn.Conv2d(8, 16, 3, **options).double(), lambda m: m(x[0]))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_convolutions_multiply_cast_operands(mode: Any) -> None:
    x, layer = torch.randn(2, 40, 9, 10), nn.Conv2d(40, 16, 3, padding=1, padding_mode=mode)
    assert assert_products(layer, lambda m: m(x)) == 1


# ---------------------------------------------------------------- attention

E, HEADS, L, S, N = 16, 4, 5, 7, 3


def attention(**options: Any) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(E, HEADS, **options).double()
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)  # they begin as zeros
    return layer


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without weights": {"need_weights": False},
    "weights by head": {"average_attn_weights": False},
    "bool mask": {"attn_mask": torch.ones(L, S, dtype=torch.bool).triu(3)},
    "float mask": {"attn_mask": doubles(L, S)},
    "mask by head": {"attn_mask": doubles(N * HEADS, L, S), "need_weights": False},
    "padding": {"key_padding_mask": torch.arange(S) > torch.tensor([6, 3, 5])[:, None]},
    "float padding": {"key_padding_mask": doubles(N, S), "need_weights": False},
    "both": {
        "attn_mask": torch.ones(L, S, dtype=torch.bool).triu(3),
        "key_padding_mask": torch.arange(S) > torch.tensor([6, 3, 5])[:, None],
    },
    "causal": {
        "attn_mask": torch.ones(L, S, dtype=torch.bool).triu(1),
        "is_causal": True,
        "need_weights": False,
    },
}


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kdim": 12, "vdim": 9},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"batch_first": True},
    ],
    ids=str,
)
def test_attention_is_torchs(options: dict[str, Any], call: str) -> None:
    layer = attention(**options)
    q, k, v = doubles(L, N, E), doubles(S, N, layer.kdim), doubles(S, N, layer.vdim)
    if layer.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    given = dict(CALLS[call])
    if layer.bias_k is not None:
        # PyTorch drops the mask for its hint, and then hides the added keys too.
        given.pop("is_causal", None)
    assert_same_function(layer, lambda m: m(q, k, v, **given))


@pytest.mark.usefixtures("identity")
def test_attention_without_a_batch_is_torchs() -> None:
    q, k, mask = doubles(L, E), doubles(S, E), torch.rand(HEADS, L, S) < 0.2
    assert_same_function(attention(batch_first=True), lambda m: m(q, k, k, attn_mask=mask))
    padding = torch.arange(S) > 4
    assert_same_function(attention(), lambda m: m(q, k, k, key_padding_mask=padding))


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("training", [True, False])
def test_self_attention_and_dropout_are_torchs(training: bool) -> None:
    layer, x = attention(dropout=0.5).train(training), doubles(L, N, E)
    # PyTorch drops the same probabilities, in one tensor of the same order.
    assert_same_function(layer, lambda m: m(x, x, x))


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_transformer_layers_are_torchs(training: bool, norm_first: bool) -> None:
    options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
    layer = nn.Transformer(E, HEADS, 2, 2, 32, **options).double().train(training)
    x, y = doubles(N, S, E), doubles(N, L, E)
    padding = torch.arange(S) > torch.tensor([6, 3, 5])[:, None]
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    masks = {"tgt_mask": causal, "tgt_is_causal": True, "src_key_padding_mask": padding.double()}
    wrapped = nn.Sequential()
    wrapped.add_module("t", layer)

    def call(m: nn.Module) -> Tensor:
        result: Tensor = m.get_submodule("t")(x, y, **masks)
        return result

    twin = copy.deepcopy(wrapped)
    convert(twin, SPELLING, verbose=False)
    torch.testing.assert_close(call(twin), call(wrapped), rtol=1e-9, atol=1e-9)


def test_attention_multiplies_cast_operands() -> None:
    q, k = torch.randn(L, N, 64), torch.randn(40, N, 64)
    layer = nn.MultiheadAttention(64, 4)
    padding = torch.arange(40) > torch.tensor([39, 20, 10])[:, None]
    count = assert_products(layer, lambda m: m(q, k, k, key_padding_mask=padding))
    assert count == 3 + 2 + 1


@pytest.mark.parametrize("training", [True, False])
def test_no_fused_path_goes_around_the_casts(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).train(training)
    x, padding = torch.randn(2, 40, 64), torch.arange(40) > torch.tensor([39, 20])[:, None]
    for module in (layer.train(training), encoder):
        depth = 2 if module is encoder else 1
        expected = depth * (3 + 2 + 1 + 2)
        assert assert_products(module, lambda m: m(x)) == expected
        assert assert_products(module, lambda m: m(x, src_key_padding_mask=padding)) == expected


def test_the_output_projection_has_a_policy_of_its_own() -> None:
    layer, x = nn.MultiheadAttention(64, 4), torch.randn(3, 2, 64)
    policy = Policy.of("mxfp4", "mxfp4", overrides={"out_proj": "mxint8"})
    convert(layer, policy, verbose=False)
    with record_products() as ledger:
        layer(x, x, x)
    formats = {row.module: row.formats for row in ledger if row.product == "linear"}
    assert formats == {"": ("mxfp4", "mxfp4"), "out_proj": ("mxint8", "mxint8")}


def test_attention_refuses_a_hint_without_its_mask() -> None:
    layer, x = converted(nn.MultiheadAttention(8, 2)), torch.randn(3, 2, 8)
    with pytest.raises(MicroscaleError, match="is_causal=True, a hint about attn_mask"):
        layer(x, x, x, is_causal=True)
    with pytest.raises(MicroscaleError, match=r"mask of torch\.int64; give a boolean or a float"):
        layer(x, x, x, attn_mask=torch.ones(3, 3, dtype=torch.int64))


# ---------------------------------------------------------------- LSTM


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 3, "bidirectional": True},
        {"num_layers": 2, "proj_size": 4, "batch_first": True},
        {"bias": False, "bidirectional": True, "batch_first": True},
        {"bias": False, "proj_size": 4},
    ],
    ids=str,
)
def test_lstm_is_torchs(options: dict[str, Any], batch: bool, state: bool) -> None:
    layer = nn.LSTM(6, 10, **options).double()
    x = doubles(3, 4, 6) if batch else doubles(4, 6)
    n = (x.shape[0] if layer.batch_first else x.shape[1],) if batch else ()
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    h, c = doubles(rows, *n, layer.proj_size or 10), doubles(rows, *n, 10)
    assert_same_function(layer, lambda m: m(x, (h, c)) if state else m(x))


@pytest.mark.usefixtures("identity")
def test_lstm_drops_between_layers_in_training_alone() -> None:
    layer, x = nn.LSTM(6, 10, num_layers=2, dropout=0.5).double(), doubles(3, 4, 6)
    assert_same_function(layer.eval(), lambda m: m(x))
    twin = converted(layer.train())
    assert not torch.equal(twin(x)[0], twin(x)[0])


def test_lstm_multiplies_cast_operands() -> None:
    layer, x = (
        nn.LSTM(40, 48, num_layers=2, bidirectional=True, proj_size=33),
        torch.randn(5, 2, 40),
    )
    assert assert_products(layer, lambda m: m(x)) == 4 * (1 + 5 + 5)


def test_lstm_refuses_what_it_cannot_run() -> None:
    layer = converted(nn.Sequential(nn.LSTM(6, 10)).get_submodule("0"))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
        layer(torch.randn(3, 2, 6), (torch.zeros(1, 3, 10), torch.zeros(1, 2, 10)))


@pytest.mark.parametrize(
    "layer", [nn.Linear(8, 8), nn.Conv1d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.LSTM(8, 8)], ids=str
)
def test_layers_show_their_formats(layer: nn.Module) -> None:
    assert SPELLING in repr(converted(layer))


@pytest.mark.parametrize("layer", [nn.MultiheadAttention(64, 4), nn.LSTM(64, 64)], ids=str)
def test_packed_weights_give_the_same_bits(layer: nn.Module) -> None:
    x = torch.randn(3, 2, 64)
    arguments = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
    twin = converted(layer)
    with torch.no_grad():
        expected = list(tensors(twin(*arguments)))
        for module in twin.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dim() == 2:
                    packed: Any = quantize(parameter, "mxfp4")
                    setattr(module, name, nn.Parameter(packed, requires_grad=False))
        with record_products() as ledger:
            got = list(tensors(twin(*arguments)))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert {row.how for row in ledger if row.product in ("linear", "lstm")} == {"packed"}
