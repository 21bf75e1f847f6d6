"""einsum, tensordot, inner, addbmm: PyTorch's functions, as products of cast matrices."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microscale.weights as weights_module
from layer_checks import doubles
from microscale.cast import cast
from microscale.convert import convert
from microscale.errors import MicroscaleError
from microscale.functional import addbmm, einsum, inner, matmul, tensordot
from microscale.ledger import record_products
from microscale.policy import Policy
from microscale.tensor import quantize
from product_spy import ProductSpy

MIXED = Policy.parse("mxfp4/mxfp6_e2m3")
SIDES = Policy.from_dict({"matmul": {"left": "mxfp8_e5m2", "right": "mxint8"}})


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts that change nothing."""

    def unchanged(x: Tensor, *_: object, **__: object) -> Tensor:
        return x * 1

    monkeypatch.setattr(weights_module, "cast", unchanged)


EQUATIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "ij,jk->ik": ((3, 4), (4, 5)),
    "ij,jk": ((3, 4), (4, 5)),
    "ba,ca": ((3, 4), (5, 4)),
    "bij,bjk->bik": ((2, 3, 4), (2, 4, 5)),
    "bij,bjk->kib": ((2, 3, 4), (2, 4, 5)),
    "i,i->": ((4,), (4,)),
    "bnd,dhk->bnhk": ((2, 3, 4), (4, 5, 6)),
    "bnhk,dhk->bnd": ((2, 3, 5, 6), (4, 5, 6)),
    "bhqd,bhkd->bhqk": ((2, 3, 4, 5), (2, 3, 6, 5)),
    "...ij,...jk->...ik": ((2, 1, 3, 4), (7, 4, 5)),
    "...i,ij->...j": ((2, 3, 4), (4, 5)),
    "i...,j...->ij": ((3, 4, 2), (5, 4, 2)),
    "a...b,b": ((3, 2, 4), (4,)),
    "abc,cba->b": ((2, 3, 4), (4, 3, 2)),
    "i j , j k -> i k": ((3, 4), (4, 5)),
    "ij,jk->ik ": ((3, 1), (4, 5)),
    "bij,bj->bi": ((1, 3, 4), (2, 4)),
    "Ab,bA->A": ((3, 4), (4, 3)),
}


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum_is_torchs(equation: str) -> None:
    a, b = (doubles(*shape).requires_grad_() for shape in EQUATIONS[equation])
    ours = einsum(equation, a, b, policy=MIXED)
    torchs = torch.einsum(equation, a, b)
    torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(torchs)
    grads = (torch.autograd.grad(out, (a, b), upstream) for out in (ours, torchs))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_einsum_casts_along_what_is_summed_over_flattened() -> None:
    x, weight = torch.randn(2, 3, 6, 20), nn.Parameter(torch.randn(7, 6, 20))
    with torch.no_grad(), ProductSpy() as spy, record_products() as ledger:
        result = einsum("bnhk,dhk->bnd", x, weight, policy=MIXED, name="out")
    (seen,) = spy.seen
    seen.check_result()
    assert torch.equal(seen.left, cast(x.reshape(6, 120), "mxfp6_e2m3"))
    assert torch.equal(seen.right.mT, cast(weight.detach().reshape(7, 120), "mxfp4"))
    assert torch.equal(result.reshape(6, 7), seen.result)
    assert [(row.module, row.product, row.how, row.formats) for row in ledger] == [
        ("out", "einsum", "emulated", ("mxfp6_e2m3", "mxfp4"))
    ]


def test_einsum_of_a_batch_of_activations() -> None:
    q, k = torch.randn(2, 5, 3, 40), torch.randn(2, 7, 3, 40)
    with ProductSpy() as spy:
        einsum("bqhd,bkhd->bhqk", q, k, policy=SIDES)
    (seen,) = spy.seen
    seen.check_result()
    seen.check_operands("mxfp8_e5m2", "mxint8")
    assert torch.equal(seen.left.reshape(2, 3, 5, 40), cast(q, "mxfp8_e5m2").transpose(1, 2))


CHAINS: dict[str, tuple[tuple[int, ...], ...]] = {
    "ij,jk,kl->il": ((3, 4), (4, 5), (5, 6)),
    "ij,jk,kl": ((3, 4), (4, 5), (5, 6)),
    "bi,ijk,bk->bj": ((2, 3), (3, 4, 5), (2, 5)),
    "...i,ij,...j->...": ((2, 7, 3), (3, 4), (7, 4)),
    "ij,jk,kl,lm->mi": ((3, 4), (4, 5), (5, 6), (6, 2)),
    "i,j,ij->": ((3,), (4,), (3, 4)),
}


class Chain(nn.Module):
    """An einsum of several operands."""

    def forward(self, equation: str, *operands: Tensor) -> Tensor:
        return torch.einsum(equation, *operands)


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("equation", CHAINS)
def test_several_operands_are_taken_two_at_a_time(equation: str) -> None:
    model = Chain()
    convert(model, MIXED, verbose=False)
    operands = [doubles(*shape) for shape in CHAINS[equation]]
    with record_products() as ledger:
        ours = model(equation, *operands)
    torch.testing.assert_close(ours, torch.einsum(equation, *operands), rtol=1e-10, atol=1e-10)
    assert {row.product for row in ledger} == {"einsum"}
    assert sum(row.calls for row in ledger) == len(operands) - 1
    skipped = [row.reason for row in ledger if row.how == "skipped"]
    assert skipped == (["it sums no products"] if equation == "i,j,ij->" else [])


def test_every_step_of_several_operands_is_cast() -> None:
    model = Chain()
    convert(model, SIDES, verbose=False)
    a, b, c = torch.randn(3, 40), torch.randn(40, 33), torch.randn(33, 5)
    first = cast(a, "mxfp8_e5m2") @ cast(b, "mxint8", 0)
    second = cast(first, "mxfp8_e5m2") @ cast(c, "mxint8", 0)
    torch.testing.assert_close(model("ij,jk,kl->il", a, b, c), second)


@pytest.mark.parametrize(
    ("equation", "shapes", "says"),
    [
        ("ii,ij->j", ((4, 4), (4, 5)), "it takes a diagonal"),
        ("ij,ij->ij", ((3, 4), (3, 4)), "it sums no products"),
        ("i,j->ij", ((3,), (4,)), "it sums no products"),
        ("ij,jk->i", ((3, 4), (4, 5)), "one operand alone is summed over k"),
        ("ij,jk->ikx", ((3, 4), (4, 5)), "a dimension that no operand has"),
        ("ij,jk->ik", ((3, 4, 2), (4, 5)), "'ij' does not fit an operand of 3 dimensions"),
        ("i%,%k->ik", ((3, 4), (4, 5)), "'i%' is not a list of dimensions"),
        ("ij->ji", ((3, 4), (4, 5)), "it has 1 terms for 2 operands"),
    ],
)
def test_what_is_no_matrix_product_is_refused(
    equation: str, shapes: tuple[tuple[int, ...], ...], says: str
) -> None:
    a, b = (torch.randn(shape) for shape in shapes)
    with pytest.raises(MicroscaleError) as raised:
        einsum(equation, a, b, policy=MIXED)
    assert says in str(raised.value)


def test_what_cannot_be_cast_is_refused() -> None:
    whole = torch.ones(3, 3, dtype=torch.int64)
    with pytest.raises(MicroscaleError, match=r"operands of torch\.int64 are not cast"):
        tensordot(whole, whole, 1, policy=MIXED)
    with pytest.raises(MicroscaleError, match="tensordot with dims=0 is not quantized"):
        tensordot(torch.ones(3), torch.ones(3), 0, policy=MIXED)
    with pytest.raises(MicroscaleError, match="inner product of a number"):
        inner(torch.ones(3), torch.tensor(3.0), policy=MIXED)


DIMS: list[Any] = [1, 2, ([1], [2]), ([2, 0], [1, 3]), ([-1], [0]), torch.tensor(2)]


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_tensordot_is_torchs(dims: Any) -> None:
    a = doubles(6, 5, 4)
    shape = {"([1], [2])": (3, 2, 5), "([2, 0], [1, 3])": (3, 4, 2, 6)}.get(str(dims), (4, 7, 2))
    b = doubles(5, 4, 3) if dims in (2, torch.tensor(2)) else doubles(*shape)
    ours, torchs = tensordot(a, b, dims, policy=MIXED), torch.tensordot(a, b, dims)
    torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize(("left", "right"), [((3, 4), (2, 5, 4)), ((4,), (4,)), ((4,), (2, 4))])
def test_inner_is_torchs(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = doubles(*left), doubles(*right)
    torch.testing.assert_close(inner(a, b, policy=MIXED), torch.inner(a, b))


def test_addbmm_sums_over_the_batch_too() -> None:
    c, a, b = torch.randn(5, 7), torch.randn(3, 5, 20), torch.randn(3, 20, 7)
    with ProductSpy() as spy:
        result = addbmm(c, a, b, beta=0.5, alpha=2, policy=SIDES)
    (seen,) = spy.seen
    seen.check_result()
    assert torch.equal(seen.left, cast(a.transpose(0, 1).reshape(5, 60), "mxfp8_e5m2"))
    assert torch.equal(seen.right, cast(b.reshape(60, 7), "mxint8", 0))
    assert torch.equal(result, 0.5 * c + 2 * seen.result)
    hidden = addbmm(torch.full((5, 7), torch.nan), a, b, beta=0, policy=SIDES)
    assert torch.equal(hidden, seen.result)


def test_weights_are_kept_where_their_layout_is_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, casts = torch.randn(3, 40), nn.Parameter(torch.randn(40, 6, 5)), []

    def counting(x: Tensor, *args: Any, **options: Any) -> Tensor:
        casts.append(x.shape)
        result: Tensor = cast(x, *args, **options)
        return result

    monkeypatch.setattr(weights_module, "cast", counting)
    for _ in range(3):
        einsum("bd,dhk->bhk", x, weight, policy=MIXED)
    assert sorted(casts) == [(3, 40)] * 3 + [(40, 30)]


def test_packed_weights_are_used_as_they_are() -> None:
    x, weight = torch.randn(3, 64), torch.randn(7, 64)
    packed = quantize(weight, "mxint8")
    expected = cast(x, "mxfp6_e2m3") @ packed.dequantize().mT
    with record_products() as ledger:
        assert torch.equal(einsum("bi,oi->bo", x, packed, policy=MIXED), expected)
    assert [(row.how, row.formats) for row in ledger] == [("packed", ("mxfp6_e2m3", "mxint8"))]


@pytest.mark.parametrize("shape", [(5, 8, 3), (8,)])
def test_each_matrix_of_a_batch_has_scales_of_its_own_channels(shape: tuple[int, ...]) -> None:
    weight = nn.Parameter(torch.randn(shape))
    with torch.no_grad(), ProductSpy() as spy:
        matmul(torch.randn(5, 4, 8), weight, policy=Policy.parse("int8-channel/fp32"))
    axis = -2 if len(shape) > 1 else -1
    expected = cast(weight.detach(), "int8-token", axis)
    assert torch.equal(spy.seen[0].right.reshape(shape), expected)
