"""Linear layers forward and backward: three products, each of operands cast for itself.

Held to a float64 twin that casts the same operands, within the bound of docs/numerics.md.
"""

import pytest
import torch
from torch import Tensor, nn

from microscale.cast import cast
from microscale.functional import linear
from microscale.functional.factor import Factor, suits
from microscale.kernels.native import dense
from microscale.policy import Policy

SHAPE = 130, 300, 200  # tokens, in, out: ragged, and large enough for bfloat16
FORMATS = ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8", "nvfp4",
           "int8-channel", "fp8_e4m3-tensor"]  # fmt: skip


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the products that ran in bfloat16."""
    seen: list[tuple[int, ...]] = []
    multiply = dense.multiply

    def spied(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append((*left.shape, right.shape[0]))
        return multiply(left, right, bias)

    monkeypatch.setattr(dense, "multiply", spied)
    return seen


def check(got: Tensor | None, left: Tensor, right: Tensor, added: Tensor | None = None) -> None:
    """Hold a product [M, N] of cast factors [M, K] and [N, K] to float64, within the bound."""
    assert got is not None
    a, b = left.double(), right.double()
    bias = torch.zeros(()).double() if added is None else added.double()
    exact, terms = a @ b.T + bias, a.abs() @ b.abs().T + bias.abs()
    n = (a.shape[1] + 16) * 2.0**-24
    limit = n / (1 - n) * terms + a.shape[1] * 2.0**-126
    limit += torch.finfo(got.dtype).eps / 2 * (exact.abs() + limit)
    assert got.shape == exact.shape
    assert (got.double() - exact).abs().le(limit).all()


def layer(
    shape: tuple[int, int, int] = SHAPE, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, nn.Parameter, nn.Parameter, Tensor]:
    """Input, weight, bias and the gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    tokens, inside, outside = shape
    sizes = [(tokens, inside), (outside, inside), (outside,), (tokens, outside)]
    x, w, b, g = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return x.requires_grad_(), nn.Parameter(w), nn.Parameter(b), g


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", FORMATS)
def test_each_product_casts_its_operands_along_its_own_axis(
    fmt: str, dtype: torch.dtype, narrow: list[tuple[int, ...]]
) -> None:
    x, w, b, g = layer(dtype=dtype)
    policy = Policy.of(weight=fmt, activation="mxfp6_e2m3", grad="mxfp8_e5m2")
    result = linear(x, w, b, policy=policy)
    result.backward(g)
    x0, w0 = x.detach(), w.detach()
    check(result, cast(x0, "mxfp6_e2m3"), cast(w0, fmt), b.detach())
    check(x.grad, cast(g, "mxfp8_e5m2"), cast(w0, fmt, 0).T)
    check(w.grad, cast(g, "mxfp8_e5m2", 0).T, cast(x0, "mxfp6_e2m3", 0).T)
    assert b.grad is not None
    assert torch.equal(b.grad, g.sum(0))
    tokens, inside, outside = SHAPE
    exact = fmt.startswith("mx")  # the scale is a power of two
    products = [(tokens, inside, outside), (tokens, outside, inside)] if exact else []
    products.append((outside, tokens, inside))
    assert narrow == (products if dtype is torch.float32 and dense.available() else [])


@pytest.mark.parametrize("shape", [(16, 1024, 300), (9, 4096, 130), (2000, 33, 65)])
def test_ragged_shapes(shape: tuple[int, int, int]) -> None:
    x, w, b, g = layer(shape)
    result = linear(x, w, b, policy=Policy.of("mxfp4", "mxint8", "mxfp8_e4m3"))
    result.backward(g)
    x0, w0 = x.detach(), w.detach()
    check(result, cast(x0, "mxint8"), cast(w0, "mxfp4"), b.detach())
    check(x.grad, cast(g, "mxfp8_e4m3"), cast(w0, "mxfp4", 0).T)
    check(w.grad, cast(g, "mxfp8_e4m3", 0).T, cast(x0, "mxint8", 0).T)


def test_tokens_are_flattened_over_all_dimensions() -> None:
    x, w, b, g = layer()
    folded = x.detach().reshape(2, 5, 13, -1).requires_grad_()
    policy = Policy.of("mxfp4", "mxfp4", "mxfp4")
    results = []
    for each, grad in ((x, g), (folded, g.reshape(2, 5, 13, -1))):
        w.grad = None
        linear(each, w, b, policy=policy).backward(grad)
        assert each.grad is not None
        results.append((each.grad.reshape(x.shape), w.grad))
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_without_operands_of_its_own_the_backward_pass_takes_the_forwards_casts() -> None:
    x, w, _, g = layer()
    linear(x, w, policy=Policy.parse("mxfp4/mxfp8_e4m3")).backward(g)
    check(x.grad, g, cast(w.detach(), "mxfp4").T)
    check(w.grad, g.T, cast(x.detach(), "mxfp8_e4m3").T)


def test_one_backward_operand_leaves_its_partner_as_it_is() -> None:
    x, w, _, g = layer()
    policy = Policy.from_dict({"forward": {"weight": "mxfp4"}, "wgrad": {"grad": "mxfp8_e5m2"}})
    linear(x, w, policy=policy).backward(g)
    check(x.grad, g, w.detach().T)
    check(w.grad, cast(g, "mxfp8_e5m2", 0).T, x.detach().T)


def test_stochastic_rounding_repeats_with_torchs_seed() -> None:
    policy = Policy.of("mxfp4", "mxfp4", "mxfp4", rounding="stochastic")
    results = []
    for seed in (1, 1, 2):
        x, w, _, g = layer()
        torch.manual_seed(seed)
        linear(x, w, policy=policy).backward(g)
        results.append((x.grad, w.grad))
    assert all(torch.equal(p, q) for p, q in zip(*results[:2], strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(*results[1:], strict=True))


def test_gradients_of_gradients() -> None:
    x, w, _, g = layer()
    policy = Policy.of("mxfp8_e4m3", "mxfp8_e4m3", "mxfp8_e4m3")
    upstream = g.requires_grad_()
    (dx,) = torch.autograd.grad(linear(x, w, policy=policy), x, upstream, create_graph=True)
    (dg,) = torch.autograd.grad(dx.sum(), upstream)
    torch.testing.assert_close(dg, cast(w.detach(), "mxfp8_e4m3", 0).sum(1).expand_as(dg))


def test_a_weights_cast_is_kept_until_it_changes() -> None:
    x, w, _, _ = layer()
    policy = Policy.parse("mxfp4")
    with torch.no_grad():
        before = linear(x, w, policy=policy)
        assert torch.equal(linear(x, w, policy=policy), before)
        w.mul_(2)
        assert torch.equal(linear(x, w, policy=policy), 2 * before)


# ---------------------------------------------------------------- what bfloat16 does not hold


@pytest.mark.parametrize("size", [2.0**-130, 2.0**-135])
def test_numbers_below_bfloat16s_normal_ones_are_multiplied_in_float32(
    size: float, narrow: list[tuple[int, ...]]
) -> None:
    x, w, _, _ = layer()
    tiny = x.detach().clone()
    tiny[3] *= size
    with torch.no_grad():
        w.mul_(2.0**100)
        got = linear(tiny, w, policy=Policy.parse("mxfp8_e4m3"))
    assert not narrow
    values = cast(tiny, "mxfp8_e4m3")
    assert values[3].any()
    check(got, values, cast(w.detach(), "mxfp8_e4m3"))


def test_nonfinite_values_stay_where_they_are() -> None:
    x, w, _, _ = layer()
    poisoned = x.detach().clone()
    poisoned[5, 7], poisoned[9, 0] = torch.nan, torch.inf
    with torch.no_grad():
        got = linear(poisoned, w, policy=Policy.parse("mxfp4"))
    bad = got.isnan().any(1)
    assert bad.nonzero().flatten().tolist() == [5, 9]
    kept = ~bad
    check(got[kept], cast(x.detach(), "mxfp4")[kept], cast(w.detach(), "mxfp4"))


def test_autocast_casts_what_there_is_and_gives_its_own_type() -> None:
    x, w, b, g = layer()
    policy = Policy.of("mxfp4", "mxfp4", "mxfp4")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = linear(x, w, b, policy=policy)
    assert result.dtype is torch.bfloat16
    result.backward(g.bfloat16())
    assert x.grad is not None
    check(x.grad.bfloat16(), cast(g.bfloat16(), "mxfp4"), cast(w.detach(), "mxfp4", 0).T)


def test_watchers_see_the_casts_and_the_product() -> None:
    from microscale.watch import watching, watching_products

    x, w, _, _ = layer()
    seen: list[tuple[object, ...]] = []
    products: list[object] = []
    with (
        torch.no_grad(),
        watching(lambda t, o, axis, weight: seen.append((t.shape, str(o), axis % 2, weight))),
        watching_products(products.append),
    ):
        linear(x, w, policy=Policy.of("mxfp4", "mxfp6_e2m3", "mxfp8_e4m3"))
    assert seen == [(x.shape, "mxfp6_e2m3", 1, False), (w.shape, "mxfp4", 1, True)]
    assert len(products) == 1


# ---------------------------------------------------------------- the product itself


@pytest.mark.skipif(not dense.available(), reason="needs AVX-512 BF16")
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 33, 13), (17, 300, 49), (530, 257, 200)])
@pytest.mark.parametrize("modelled", [False, True])
def test_rows_behind_each_other_or_side_by_side(
    shape: tuple[int, int, int], modelled: bool
) -> None:
    from microscale.kernels.native.loader import native

    library = native().library
    assert library is not None
    rows, length, columns = shape
    a, b = torch.randn(rows, length).bfloat16(), torch.randn(columns, length).bfloat16()
    bias, turned = torch.randn(columns), [t.t().contiguous().t() for t in (a, b)]
    assert library.ms_model_tiles(int(modelled)) == 0
    try:
        results = [dense.multiply(x, y, bias) for x in (a, turned[0]) for y in (b, turned[1])]
    finally:
        library.ms_model_tiles(0)
    check(results[0], a, b, bias)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.skipif(not dense.available(), reason="needs AVX-512 BF16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extent(dtype: torch.dtype) -> None:
    x = torch.randn(100_003).to(dtype)
    sizes = x.double().abs()
    assert dense.extent(x) == (sizes[sizes > 0].min().item(), sizes.max().item())
    x[5], x[6], x[7], x[8] = torch.nan, -torch.inf, 0.0, 2.0**-130
    assert dense.extent(x) == (2.0**-130, sizes.max().item())
    assert dense.extent(torch.zeros(3, dtype=dtype)) == (torch.inf, 0.0)


def test_small_products_are_pytorchs() -> None:
    x, w = torch.randn(8, 64), nn.Parameter(torch.randn(8, 64))
    policy = Policy.parse("mxfp4")
    left, right = (Factor(t, policy.forward.input, 1) for t in (x, w))
    assert not suits(left, right)
