"""Products written as operators: seen in the scope of their module, once, and nowhere else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_upper_left
from torch.overrides import get_overridable_functions

from microscale.cast import cast
from microscale.convert import convert
from microscale.handlers import HANDLERS
from microscale.ledger import record_products
from microscale.policy import Policy
from microscale.products import LEFT, PRODUCTS, QUANTIZED
from microscale.tensor import quantize
from product_spy import ProductSpy

Body = Callable[["Own", Tensor], Any]


class Own(nn.Module):
    """A user's module with a weight, and products as its body writes them."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 64))
        self.b = nn.Parameter(torch.randn(64))
        self.body = body

    def forward(self, x: Tensor) -> Any:
        """Whatever the body does with x [4, 8, 64]."""
        return self.body(self, x)


BY_WEIGHT: dict[str, Body] = {
    "@": lambda m, x: x @ m.w,
    "reflected": lambda m, x: m.w.__rmatmul__(x),
    "torch.matmul": lambda m, x: torch.matmul(x, m.w),
    "by name": lambda m, x: torch.matmul(input=x, other=m.w),
    "half by name": lambda m, x: torch.matmul(x, other=m.w),
    "method": lambda m, x: x.matmul(m.w),
    "method by name": lambda m, x: x.matmul(other=m.w),
    "linalg": lambda m, x: torch.linalg.matmul(x, m.w),
    "mm": lambda m, x: torch.mm(x[0], m.w),
    "mm by name": lambda m, x: x[0].mm(mat2=m.w),
    "addmm": lambda m, x: torch.addmm(m.b, x[0], m.w),
    "addmm by name": lambda m, x: torch.addmm(input=m.b, mat1=x[0], mat2=m.w, beta=2, alpha=0.5),
    "addmm method": lambda m, x: x[1].new_ones(8, 64).addmm(x[0], m.w, alpha=3),
    "addmm_": lambda m, x: x[1].new_ones(8, 64).addmm_(x[0], mat2=m.w),
    "bmm": lambda m, x: torch.bmm(x, m.w.expand(4, 64, 64)),
    "baddbmm": lambda m, x: torch.baddbmm(x, batch1=x, batch2=m.w.expand(4, 64, 64)),
    "transposed": lambda m, x: x @ m.w.mT,
    "F.linear": lambda m, x: F.linear(x, m.w, m.b),
    "F.conv1d": lambda m, x: F.conv1d(x.mT, m.w[:, :, None], m.b, padding=1),
    "F.conv2d": lambda m, x: F.conv2d(x.mT[..., None], weight=m.w[:, :, None, None]),
    "F.conv3d": lambda m, x: F.conv3d(x.mT[..., None, None], m.w[:, :, None, None, None]),
    "F.conv_transpose1d": lambda m, x: F.conv_transpose1d(x.mT, m.w[..., None], m.b, 2),
    "F.conv_transpose2d": lambda m, x: F.conv_transpose2d(x.mT[..., None], m.w[..., None, None]),
    "F.conv_transpose3d": lambda m, x: F.conv_transpose3d(
        x.mT[..., None, None], weight=m.w[..., None, None, None]
    ),
    "einsum": lambda m, x: torch.einsum("bij,jk->bik", x, m.w),
    "einsum, implicit": lambda m, x: torch.einsum("bij,kj", x, m.w),
    "einsum, list": lambda m, x: torch.einsum("bij,jk->bik", [x, m.w]),
    "einsum, sublists": lambda m, x: torch.einsum(x, [0, 1, 2], m.w, [2, 3], [0, 1, 3]),
    "einsum, dots": lambda m, x: torch.einsum("...j,jk->k...", x, m.w),
    "tensordot": lambda m, x: torch.tensordot(x, m.w, 1),
    "tensordot by name": lambda m, x: torch.tensordot(a=x, b=m.w, dims=([2], [1])),
    "inner": lambda m, x: torch.inner(x, m.w),
    "inner method": lambda m, x: x.inner(other=m.w),
    "mv": lambda m, x: x[0].mv(m.b),
    "mv by name": lambda m, x: torch.mv(x[0], vec=m.b),
    "addmv": lambda m, x: torch.addmv(x[0, :, 0], x[1], m.b, beta=0.5),
    "addmv_": lambda m, x: x.new_ones(8).addmv_(x[1], vec=m.b),
    "dot": lambda m, x: torch.dot(x[0, 0] + m.b, m.b),
    "dot by name": lambda m, x: (x[0, 0] + m.b).dot(tensor=m.b),
    "vdot": lambda m, x: torch.vdot(x[0, 0] + m.b, other=m.b),
    "left": lambda m, x: m.w @ x.mT,
}

BY_ACTIVATION: dict[str, Body] = {
    "einsum": lambda m, x: torch.einsum("bij,bkj->bik", x, x),
    "tensordot": lambda m, x: torch.tensordot(x, x, dims=([1, 2], [1, 2])),
    "addbmm": lambda m, x: torch.addbmm(m.w, x.mT, x),
    "addbmm by name": lambda m, x: torch.addbmm(input=m.w, batch1=x.mT, batch2=x, beta=0),
    "addbmm_": lambda m, x: x.new_ones(64, 64).addbmm_(x.mT, x, alpha=0.5),
    "@": lambda m, x: x @ x.mT,
    "bmm": lambda m, x: torch.bmm(x, x.mT),
    "bmm by name": lambda m, x: x.bmm(mat2=x.mT),
    "baddbmm_": lambda m, x: x.new_ones(4, 8, 8).baddbmm_(x, x.mT),
    "out": lambda m, x: torch.bmm(x, x.mT, out=torch.empty(4, 8, 8)),
    "attention": lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "attention by name": lambda m, x: F.scaled_dot_product_attention(key=x, query=x, value=x),
}


def run(body: Body, policy: Policy) -> ProductSpy:
    module = Own(body)
    convert(module, policy, verbose=False)
    spy = ProductSpy()
    with torch.no_grad(), spy:
        module(torch.randn(4, 8, 64))
    return spy


@pytest.mark.parametrize("body", BY_WEIGHT)
def test_parameters_are_weights(body: str) -> None:
    spy = run(BY_WEIGHT[body], Policy.of("mxfp4", "mxfp6_e2m3"))
    (seen,) = spy.seen
    left, right = ("mxfp4", "mxfp6_e2m3") if body == "left" else ("mxfp6_e2m3", "mxfp4")
    seen.check_operands(left, right)


@pytest.mark.parametrize("body", BY_ACTIVATION)
def test_other_operands_are_activations(body: str) -> None:
    policy = Policy.from_dict({"matmul": {"left": "mxfp8_e5m2", "right": "mxint8"}})
    spy = run(BY_ACTIVATION[body], policy)
    assert len(spy.seen) == (2 if body.startswith("attention") else 1)
    for seen in spy.seen:
        seen.check_operands("mxfp8_e5m2", "mxint8")


@pytest.mark.parametrize("body", [*BY_WEIGHT, *BY_ACTIVATION])
def test_results_are_those_of_the_same_call_on_cast_tensors(body: str) -> None:
    function = (BY_WEIGHT | BY_ACTIVATION)[body]
    module, x = Own(function), torch.randn(4, 8, 64)
    with torch.no_grad():
        plain = function(module, x)
        convert(module, "mxint8", verbose=False)
        close = module(x)
    # Eight bits in blocks of 32 keep three digits.
    assert not torch.equal(plain, close)
    assert (plain - close).norm() < 0.05 * plain.norm()


def test_embedding_as_a_function() -> None:
    module = Own(lambda m, x: F.embedding(torch.tensor([3, 5]), m.w))
    convert(module, "mxfp4", verbose=False)
    assert torch.equal(module(torch.empty(0)), cast(module.w.detach(), "mxfp4")[[3, 5]])


def test_embedding_bag_as_a_function() -> None:
    module = Own(lambda m, x: F.embedding_bag(torch.tensor([[3, 5]]), m.w, mode="max"))
    convert(module, "mxfp4", verbose=False)
    rows = cast(module.w.detach(), "mxfp4")[[3, 5]]
    assert torch.equal(module(torch.empty(0)), rows.amax(0, keepdim=True))


def test_bilinear_as_a_function() -> None:
    spy = run(lambda m, x: F.bilinear(x, x, m.w[None], m.b[:1]), Policy.of("mxfp4", "mxfp6_e2m3"))
    first, second = spy.seen
    first.check_operands("mxfp6_e2m3", "mxfp4")
    second.check_operands("mxfp6_e2m3", "mxfp6_e2m3")


class Heads(nn.MultiheadAttention):
    """A subclass with a forward of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Attend and add nothing."""
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("kdim", [None, 48])
@pytest.mark.parametrize("training", [True, False])
def test_subclasses_of_attention_run_on_cast_operands(training: bool, kdim: int | None) -> None:
    layer = Heads(64, 4, batch_first=True, kdim=kdim).train(training)
    q, k = torch.randn(2, 5, 64), torch.randn(2, 40, kdim or 64)
    v = torch.randn(2, 40, 64)
    expected = layer(q, k, v)
    convert(layer, "mxint8", verbose=False)
    with torch.no_grad(), ProductSpy() as spy:
        output, weights = layer(q, k, v)
    assert len(spy.seen) == 6
    for seen in spy.seen:
        seen.check_operands("mxint8", None)
    assert (output - expected[0]).norm() < 0.05 * expected[0].norm()
    assert (weights - expected[1]).norm() < 0.05 * expected[1].norm()


# ---------------------------------------------------------------- what is not quantized

UNQUANTIZED: dict[str, Body] = {
    "einsum of one": lambda m, x: torch.einsum("bij->bji", [x]),
    "einsum, elementwise": lambda m, x: torch.einsum("bij,ij->bij", x, x[0]),
    "einsum, diagonal": lambda m, x: torch.einsum("bij,jj->bij", x, m.w),
    "einsum, lonely sum": lambda m, x: torch.einsum("bij,jk->bi", x, m.w),
    "tensordot of nothing": lambda m, x: torch.tensordot(x[0], m.b, 0),
    "tensordot out": lambda m, x: torch.tensordot(x[0], m.w, 1, out=torch.empty(8, 64)),
    "inner with a number": lambda m, x: torch.inner(x, m.b[0]),
    "addbmm out": lambda m, x: torch.addbmm(m.w.detach(), x.mT, x, out=torch.empty(64, 64)),
    "multi_dot": lambda m, x: torch.linalg.multi_dot([x[0], m.w]),
    "aten": lambda m, x: torch.ops.aten.mm(x[0], m.w),
    "cdist": lambda m, x: torch.cdist(x, x),
    "bag with max_norm": lambda m, x: F.embedding_bag(
        torch.tensor([[1, 2]]), m.w.detach(), max_norm=1.0
    ),
    "max_norm": lambda m, x: F.embedding(torch.tensor([1]), m.w.detach(), max_norm=1.0),
}


@pytest.mark.parametrize("body", UNQUANTIZED)
def test_known_products_that_are_left_are_listed(body: str) -> None:
    module, x = Own(UNQUANTIZED[body]), torch.randn(4, 8, 64)
    expected = module(x)
    convert(module, "mxfp4", verbose=False)
    with record_products() as ledger:
        assert torch.equal(module(x), expected)
    (row,) = ledger
    assert (row.module, row.how) == ("", "skipped")
    assert row.reason


def test_tensors_with_their_own_ways_are_asked() -> None:
    # A CausalBias is a tensor whose data mean nothing.
    bias = causal_upper_left(8, 8)
    module = Own(lambda m, x: F.scaled_dot_product_attention(x, x, x, bias))
    x = torch.randn(4, 8, 64)
    expected = module(x)
    convert(module, "mxfp4", verbose=False)
    with record_products() as ledger:
        torch.testing.assert_close(module(x), expected)
    assert any("CausalBias has its own way" in row.reason for row in ledger)


def test_rotary_positions_stay_exact() -> None:
    # Hugging Face rotary embeddings multiply frequencies [n, 1] by positions [1, t].
    module = Own(lambda m, x: m.b[:, None].detach() @ torch.arange(1000.0)[None])
    convert(module, "mxfp4", verbose=False)
    with record_products() as ledger:
        out = module(torch.empty(0))
    assert torch.equal(out, module.b[:, None] * torch.arange(1000.0))
    assert [row.reason for row in ledger] == ["an outer product sums nothing"]


def test_packed_parameters_in_operators() -> None:
    module, x = Own(lambda m, x: x @ m.w), torch.randn(4, 8, 64)
    values = module.w.detach()
    packed: Any = quantize(values, "mxint8", 0)
    module.w = nn.Parameter(packed, requires_grad=False)
    convert(module, "mxfp6", verbose=False)
    with record_products() as ledger:
        out = module(x)
    # From packed weights sums run in another order.
    torch.testing.assert_close(out, cast(x, "mxfp6") @ cast(values, "mxint8", 0))
    assert [row.how for row in ledger] == ["packed"]


# ---------------------------------------------------------------- scopes in scopes


class Outer(nn.Module):
    """A module around another, each with a product."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Own(lambda m, x: x @ m.w)
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply three times."""
        result: Tensor = self.linear(self.inner(x)) @ x.mT
        return result


def test_inner_scopes_answer_first_and_once() -> None:
    outer, x = Outer(), torch.randn(4, 8, 64)
    policy = Policy.of("mxfp4", "mxfp4", overrides={"inner": "mxint8", "linear": "mxfp6"})
    convert(outer, policy, verbose=False)
    with torch.no_grad(), ProductSpy() as spy, record_products() as ledger:
        outer(x)
    assert [(row.module, row.product, row.formats[0], row.calls) for row in ledger] == [
        ("inner", "matmul", "mxint8", 1),
        ("linear", "linear", "mxfp6_e2m3", 1),
        ("", "matmul", "mxfp4", 1),
    ]
    for seen, fmt in zip(spy.seen, ("mxint8", "mxfp6_e2m3", "mxfp4"), strict=True):
        seen.check_operands(fmt, fmt)


@pytest.mark.parametrize("ignored", ["inner", "linear"])
def test_outer_scopes_leave_alone_what_inner_ones_left(ignored: str) -> None:
    outer, x = Outer(), torch.randn(4, 8, 64)
    convert(outer, Policy.of("mxfp4", "mxfp4", ignore=(ignored,)), verbose=False)
    with record_products() as ledger:
        outer(x)
    rows = {row.module: row for row in ledger}
    assert len(ledger) == 3
    assert rows[ignored].how == "skipped"
    assert rows[ignored].reason == "ignored by the policy"
    assert rows[""].how == "emulated"


def test_products_outside_of_forward_are_not_touched() -> None:
    module, x = Own(lambda m, x: x @ m.w), torch.randn(4, 8, 64)
    convert(module, "mxfp4", verbose=False)
    module(x)
    assert torch.equal(x @ module.w, torch.matmul(x, module.w))
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_scope_ends_with_an_exception() -> None:
    def fail(_: Own, __: Tensor) -> None:
        raise KeyError

    module = Own(fail)
    convert(module, "mxfp4", verbose=False)
    with pytest.raises(KeyError):
        module(torch.empty(0))
    assert torch.overrides._get_current_function_mode_stack() == []


def test_every_quantized_function_has_a_handler() -> None:
    assert HANDLERS.keys() == QUANTIZED.keys()
    assert len(PRODUCTS) == len(QUANTIZED) + len(LEFT)


def test_compiled_code_sees_every_quantized_function() -> None:
    # Dynamo shows modes the functions of this list alone.
    overridable = {f for functions in get_overridable_functions().values() for f in functions}
    hidden = {function for function, name in QUANTIZED.items() if name == "grouped_mm"}
    assert QUANTIZED.keys() - hidden <= overridable
    assert not hidden & overridable, "grouped products are seen now; the refusal is old"
