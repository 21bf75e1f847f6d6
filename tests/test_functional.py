"""Functions of `microscale.functional`: operands on their grids, results within derived bounds."""

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microscale.weights as weights_module
from microscale.cast import cast
from microscale.errors import MicroscaleError
from microscale.functional import (
    addmm,
    conv1d,
    conv2d,
    embedding,
    linear,
    lstm,
    matmul,
    scaled_dot_product_attention,
)
from microscale.functional.attention import attend
from microscale.ledger import record_products
from microscale.policy import Policy
from microscale.tensor import quantize
from product_spy import ProductSpy

MIXED = Policy.parse("mxfp4/mxfp6_e2m3")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts that change nothing, so that what is left can be compared with PyTorch."""

    def unchanged(x: Tensor, *_: object, **__: object) -> Tensor:
        return x * 1

    monkeypatch.setattr(weights_module, "cast", unchanged)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------- linear and matrix products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (0, 64)])
def test_linear(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype)
    weight = nn.Parameter(torch.randn(7, 64, dtype=dtype))
    bias = torch.randn(7, dtype=dtype)
    expected = F.linear(cast(x, "mxfp6_e2m3"), cast(weight.detach(), "mxfp4"), bias)
    assert torch.equal(linear(x, weight, bias, policy=MIXED), expected)


@pytest.mark.parametrize("K", [1, 31, 64, 100, 1000])
def test_linear_is_within_its_bound(K: int) -> None:
    with torch.no_grad(), ProductSpy() as spy:
        linear(torch.randn(50, K) * 9, torch.randn(20, K), torch.randn(20), policy=MIXED)
    spy.check("mxfp6_e2m3", "mxfp4")
    assert len(spy.seen) == 1


def test_linear_gradients_are_straight_through() -> None:
    x, weight = torch.randn(5, 64, requires_grad=True), nn.Parameter(torch.randn(7, 64))
    bias, upstream = nn.Parameter(torch.randn(7)), torch.randn(5, 7)
    linear(x, weight, bias, policy=MIXED).backward(upstream)
    assert x.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    assert torch.equal(x.grad, upstream @ cast(weight.detach(), "mxfp4"))
    assert torch.equal(weight.grad, upstream.mT @ cast(x.detach(), "mxfp6_e2m3"))
    assert torch.equal(bias.grad, upstream.sum(0))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((4, 64), (64, 5)),
        ((3, 4, 64), (3, 64, 5)),
        ((64,), (64, 5)),
        ((4, 64), (64,)),
        ((9,), (9,)),
    ],
)
def test_matmul_of_activations(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = torch.randn(left), torch.randn(right)
    policy = Policy.from_dict({"matmul": {"left": "mxfp8_e5m2", "right": "mxint8"}})
    axis = -2 if b.dim() > 1 else -1
    expected = torch.matmul(cast(a, "mxfp8_e5m2"), cast(b, "mxint8", axis))
    assert torch.equal(matmul(a, b, policy=policy), expected)


@pytest.mark.parametrize(
    "view", [lambda w: w, lambda w: w.t(), lambda w: w[:, :64], lambda w: w[0]]
)
@pytest.mark.parametrize("weight_is", ["left", "right"])
def test_parameters_and_their_views_are_weights(view: Any, weight_is: str) -> None:
    x, weight = torch.randn(64, 64), nn.Parameter(torch.randn(64, 64))
    policy = Policy.of("mxfp4", "mxfp6", storage=None)
    if weight_is == "right":
        w = view(weight)
        right = cast(w.detach(), "mxfp4", 0)
        assert torch.equal(matmul(x, w, policy=policy), cast(x, "mxfp6") @ right)
    else:
        w = view(weight)
        left = cast(w.detach(), "mxfp4", -1)
        assert torch.equal(matmul(w, x, policy=policy), left @ cast(x, "mxfp6", 0))


def test_addmm_leaves_the_first_argument() -> None:
    c, a, b = torch.randn(5, 7), torch.randn(5, 64), nn.Parameter(torch.randn(64, 7))
    right = cast(b.detach(), "mxfp4", 0)
    expected = torch.addmm(c, cast(a, "mxfp6"), right, beta=0.5, alpha=2)
    assert torch.equal(addmm(c, a, b, beta=0.5, alpha=2, policy=MIXED), expected)


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        (torch.ones(3, 4, dtype=torch.int64), torch.ones(4, 3, dtype=torch.int64), "int64"),
        (torch.ones(3, 1), torch.ones(1, 4), "outer product"),
        (torch.eye(4).to_sparse(), torch.ones(4, 4), "sparse"),
    ],
)
def test_what_cannot_be_cast_is_left_with_the_reason(a: Tensor, b: Tensor, reason: str) -> None:
    with record_products() as ledger:
        result = matmul(a, b, policy=MIXED)
    assert torch.equal(result, torch.matmul(a, b))
    (row,) = ledger
    assert row.how == "skipped"
    assert reason in row.reason


def test_packed_weights_are_used_as_they_are() -> None:
    x, weight = torch.randn(5, 64), torch.randn(7, 64)
    packed = quantize(weight, "mxint8")
    expected = F.linear(cast(x, "mxfp6"), packed.dequantize())
    with record_products() as ledger:
        assert torch.equal(linear(x, packed, policy=MIXED), expected)
        assert torch.equal(matmul(x, packed.mT, policy=MIXED), expected)
    assert [(row.how, row.formats) for row in ledger] == [("packed", ("mxfp6_e2m3", "mxint8"))] * 2


# ---------------------------------------------------------------- convolutions


GEOMETRY = [*product((0, 1, "valid"), (1, 2), (1, 2)), ("same", 1, 1), ("same", 2, 1)]


@pytest.mark.parametrize(("padding", "dilation", "stride"), GEOMETRY)
@pytest.mark.parametrize(("channels", "groups"), [(64, 1), (96, 3), (40, 1), (16, 16), (80, 2)])
def test_conv(channels: int, groups: int, padding: int | str, dilation: int, stride: int) -> None:
    x1, x2 = torch.randn(2, channels, 9), torch.randn(2, channels, 9, 7)
    w1 = nn.Parameter(torch.randn(2 * groups, channels // groups, 3))
    w2 = nn.Parameter(torch.randn(2 * groups, channels // groups, 3, 3))
    geometry: Any = (torch.randn(2 * groups), stride, padding, dilation, groups)
    # The blocks of each group begin anew.
    i1 = torch.cat([cast(part, "mxfp6_e2m3", 1) for part in x1.chunk(groups, 1)], 1)
    i2 = torch.cat([cast(part, "mxfp6_e2m3", 1) for part in x2.chunk(groups, 1)], 1)
    expected1 = F.conv1d(i1, cast(w1.detach(), "mxfp4", 1), *geometry)
    expected2 = F.conv2d(i2, cast(w2.detach(), "mxfp4", 1), *geometry)
    assert torch.equal(conv1d(x1, w1, *geometry, policy=MIXED), expected1)
    assert torch.equal(conv2d(x2, w2, *geometry, policy=MIXED), expected2)
    alone = F.conv2d(i2[0], cast(w2.detach(), "mxfp4", 1), *geometry)
    assert torch.equal(conv2d(x2[0], w2, *geometry, policy=MIXED), alone)


@pytest.mark.parametrize(("channels", "groups"), [(64, 1), (96, 3), (40, 1)])
def test_conv_is_within_its_bound(channels: int, groups: int) -> None:
    weight = torch.randn(6, channels // groups, 3, 3)
    with torch.no_grad(), ProductSpy() as spy:
        conv2d(
            torch.randn(2, channels, 8, 8),
            weight,
            torch.randn(6),
            padding=1,
            groups=groups,
            policy=MIXED,
        )
    (seen,) = spy.seen
    seen.check_result()
    seen.check_operands(None, "mxfp4")
    for part in seen.left.chunk(groups, 1):
        assert torch.equal(cast(part, "mxfp6_e2m3", 1), part)


def test_conv_with_one_scale_per_output_channel() -> None:
    x, weight = torch.randn(2, 8, 9), nn.Parameter(torch.randn(4, 8, 3))
    scale = weight.detach().flatten(1).abs().amax(1)
    policy = Policy.parse("int8-channel/fp32")
    with torch.no_grad(), ProductSpy() as spy:
        conv1d(x, weight, policy=policy)
    codes = spy.seen[0].right / (scale / 127)[:, None, None]
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)


def test_conv_gradients_are_straight_through() -> None:
    x, weight = torch.randn(2, 64, 9, requires_grad=True), nn.Parameter(torch.randn(4, 32, 3))
    conv1d(x, weight, groups=2, policy=MIXED).square().sum().backward()
    parts = [cast(part, "mxfp6", 1) for part in x.detach().chunk(2, 1)]
    i, w = torch.cat(parts, 1).requires_grad_(), cast(weight.detach(), "mxfp4", 1).requires_grad_()
    F.conv1d(i, w, groups=2).square().sum().backward()
    for ours, expected in ((x, i), (weight, w)):
        assert ours.grad is not None
        assert expected.grad is not None
        assert torch.equal(ours.grad, expected.grad)


# ---------------------------------------------------------------- embedding


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "int8-channel", "int8-token", "int8-tensor"])
def test_embedding_looks_up_the_cast_table(fmt: str) -> None:
    table, ids = nn.Parameter(torch.randn(30, 48)), torch.randint(30, (4, 5))
    policy = Policy.of(fmt)
    expected = F.embedding(ids, cast(table.detach(), fmt, -1))
    assert torch.equal(embedding(ids, table, policy=policy), expected)
    assert embedding(ids[:0], table, policy=policy).shape == (0, 5, 48)
    assert torch.equal(embedding(ids[0, 0], table, policy=policy), expected[0, 0])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("fmt", ["mxfp4", "int8-tensor"])
def test_embedding_gradient(fmt: str, sparse: bool) -> None:
    table, ids = nn.Parameter(torch.randn(30, 48)), torch.tensor([3, 3, 7, 0])
    rows = embedding(ids, table, 0, sparse=sparse, policy=Policy.of(fmt))
    rows.sum().backward()
    assert table.grad is not None
    grad = table.grad.to_dense() if sparse else table.grad
    counts = torch.bincount(ids[:3], minlength=30)  # the last one is the padding's
    assert torch.equal(grad, counts[:, None].expand(30, 48).float())


def test_embedding_of_packed_rows() -> None:
    table, ids = torch.randn(30, 48), torch.randint(30, (4,))
    with record_products() as ledger:
        rows = embedding(ids, quantize(table, "mxfp6"), policy=MIXED)
    assert torch.equal(rows, cast(table, "mxfp6")[ids])
    assert [row.how for row in ledger] == ["packed"]


def test_embedding_that_rescales_is_refused() -> None:
    with pytest.raises(MicroscaleError, match=r"embedding 'e' has max_norm=1\.0"):
        embedding(torch.tensor(0), torch.randn(3, 4), max_norm=1.0, policy=MIXED, name="e")


# ---------------------------------------------------------------- attention

MASKS = ["none", "causal", "bool", "float", "padding", "blind", "heads"]


def attention_mask(kind: str) -> dict[str, Any]:
    """Arguments of attention of [2, 4, 40, 16] queries with 50 keys."""
    if kind == "causal":
        return {"is_causal": True}
    masks = {
        "bool": torch.rand(40, 50) < 0.7,
        "float": torch.randn(2, 4, 40, 50),
        "padding": (torch.arange(50) < torch.tensor([50, 33])[:, None])[:, None, None],
        "blind": (torch.arange(40) > 2)[:, None].expand(40, 50),
        "heads": torch.rand(2, 4, 40, 50) < 0.7,
    }
    return {"attn_mask": masks[kind]} if kind in masks else {}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.usefixtures("identity")
def test_attention_does_what_torch_does(mask: str, key_heads: int, scale: float | None) -> None:
    options = {**attention_mask(mask), "scale": scale, "enable_gqa": key_heads != 4}
    shapes = (2, 4, 40, 16), (2, key_heads, 50, 16), (2, key_heads, 50, 16)
    q, k, v = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    if options.get("attn_mask") is not None and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].double()
    ours = scaled_dot_product_attention(q, k, v, **options, policy=MIXED)
    torchs = F.scaled_dot_product_attention(q, k, v, **options)
    close(ours, torchs)
    upstream = torch.randn_like(ours)
    grads = (torch.autograd.grad(out, (q, k, v), upstream) for out in (ours, torchs))
    for a, b in zip(*grads, strict=True):
        close(a, b)


@pytest.mark.parametrize("mask", [m for m in MASKS if m != "causal"])
def test_both_products_of_attention_are_on_cast_operands(mask: str) -> None:
    q, k, v = torch.randn(2, 4, 40, 16), torch.randn(2, 4, 50, 16), torch.randn(2, 4, 50, 16)
    given = attention_mask(mask).get("attn_mask")
    policy = Policy.from_dict({"matmul": {"left": "mxfp8_e4m3", "right": "mxfp6_e2m3"}})
    with ProductSpy() as spy:
        out, probabilities = attend(q, k, v, given, policy=policy)
    spy.check("mxfp8_e4m3", "mxfp6_e2m3")
    scores, values = spy.seen
    assert torch.equal(scores.left.view_as(q), cast(q, "mxfp8_e4m3"))
    assert torch.equal(scores.right.mT.reshape(k.shape), cast(k, "mxfp6_e2m3"))
    assert torch.equal(values.left.view_as(probabilities), cast(probabilities, "mxfp8_e4m3"))
    assert torch.equal(values.result.view_as(out), out)
    assert_softmax(probabilities, scores.result.view_as(probabilities) / 4, given)


def assert_softmax(probabilities: Tensor, scores: Tensor, mask: Tensor | None) -> None:
    """Hold probabilities against float64.

    The scores are exact here (1 / sqrt(16) is a power of two). A float mask and the distance to
    the row's largest are rounded once each, by u times their size, which moves an exponential by
    as much; exp, the sum of K of them and the quotient cost K + 4 more roundings.
    """
    u, moved = 2.0**-24, scores.double()
    if mask is not None:
        added = (
            torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
            if mask.dtype is torch.bool
            else mask
        )
        moved += added
    exact = moved.softmax(-1).nan_to_num(0.0)
    reach = float(moved[moved.isfinite()].abs().max())
    relative = math.exp(3 * u * 2 * reach) * (1 + (scores.shape[-1] + 4) * u) - 1
    assert ((probabilities - exact).abs() <= exact * relative).all()


@pytest.mark.parametrize("switch", ["scores", "values"])
def test_each_product_of_attention_has_a_switch(switch: str) -> None:
    q, k, v = torch.randn(3, 1, 40, 16).unbind(0)
    policy = Policy.of("mxfp4", "mxfp4", **{switch: False})  # type: ignore[arg-type]
    with ProductSpy() as spy, record_products() as ledger:
        scaled_dot_product_attention(q, k, v, policy=policy, name="a")
    on = 1 if switch == "scores" else 0
    spy.seen[on].check_operands("mxfp4", "mxfp4")
    off = spy.seen[1 - on]
    assert torch.equal(
        off.left if switch == "scores" else off.right, q if switch == "scores" else v
    )
    rows = {row.product: row for row in ledger}
    assert rows[switch].how == "skipped"
    assert rows[switch].reason == f"the policy has matmul.{switch} = false"
    assert rows["values" if switch == "scores" else "scores"].how == "emulated"


def test_ledgers_say_that_causal_values_look_ahead() -> None:
    q, k, v = torch.randn(3, 1, 40, 16).unbind(0)
    with record_products() as ledger:
        scaled_dot_product_attention(q, k, v, is_causal=True, policy=MIXED)
    assert [row.reason for row in ledger] == [
        "",
        "causal, but the scale of a block of values sees its later tokens",
    ]


def test_attention_that_is_not_quantized_is_torchs_own() -> None:
    q, k, v = torch.randn(3, 1, 40, 16).unbind(0)
    policy = Policy.of("mxfp4", "mxfp4", scores=False, values=False)
    with record_products() as ledger:
        ours = scaled_dot_product_attention(q, k, v, policy=policy)
    assert torch.equal(ours, F.scaled_dot_product_attention(q, k, v))
    assert {(row.product, row.how) for row in ledger} == {
        ("scores", "skipped"),
        ("values", "skipped"),
    }


@pytest.mark.parametrize("lowest", [None, -math.inf, torch.finfo(torch.float32).min])
def test_rows_that_nobody_sees_have_no_say_in_the_scale(lowest: float | None) -> None:
    q, k, v = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16)
    mask = torch.arange(64) < 40
    full = mask if lowest is None else torch.zeros(64).masked_fill(~mask, lowest)
    huge = v.clone()
    huge[..., 40:, :] = 1e30
    out = scaled_dot_product_attention(q, k, huge, full.expand(8, 64), policy=MIXED)
    zero = v.clone()
    zero[..., 40:, :] = 0
    assert torch.equal(
        out, scaled_dot_product_attention(q, k, zero, full.expand(8, 64), policy=MIXED)
    )
    assert out.abs().max() < 10


def test_attention_drops_probabilities() -> None:
    q, k, v = torch.randn(3, 1, 40, 16).unbind(0)
    torch.manual_seed(1)
    out = scaled_dot_product_attention(q, k, torch.ones_like(v), None, 0.5, policy=MIXED)
    assert out.std() > 0.05
    assert not scaled_dot_product_attention(q, k, v, None, 1.0, policy=MIXED).any()


def test_attention_takes_one_kind_of_mask() -> None:
    q = torch.randn(1, 4, 16)
    with pytest.raises(MicroscaleError, match="attn_mask or is_causal=True, not both"):
        scaled_dot_product_attention(q, q, q, q[0] > 0, is_causal=True, policy=MIXED)


# ---------------------------------------------------------------- LSTM


def test_lstm_weights_are_cast_once_for_all_steps() -> None:
    layer = nn.LSTM(16, 8)
    zero = torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)
    with torch.no_grad(), ProductSpy() as spy, record_products() as ledger:
        lstm(torch.randn(12, 2, 16), zero, layer.all_weights, policy=MIXED, name="l")
    assert len(spy.seen) == 13
    assert len({seen.right.data_ptr() for seen in spy.seen}) == 2
    spy.check("mxfp6_e2m3", "mxfp4")
    assert [(row.module, row.product, row.calls) for row in ledger] == [("l", "lstm", 13)]


# ---------------------------------------------------------------- everywhere


def test_products_run_under_autocast() -> None:
    x, weight = torch.randn(5, 64), nn.Parameter(torch.randn(7, 64))
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x, weight, policy=MIXED)
        attended = scaled_dot_product_attention(x, x, x, policy=MIXED)
    assert out.dtype == attended.dtype == torch.bfloat16
    # Elements times scales are exact in bfloat16, so autocast rounds the result alone.
    exact = F.linear(cast(x, "mxfp6"), cast(weight.detach(), "mxfp4"))
    torch.testing.assert_close(out.float(), exact, rtol=2.0**-7, atol=2.0**-5)


def test_nonfinite_values_are_never_hidden() -> None:
    x, weight = torch.randn(2, 64), nn.Parameter(torch.randn(7, 64))
    x[0, 3] = math.inf
    out = linear(x, weight, policy=MIXED)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
