"""`cast` inside PyTorch: gradients, torch.library, torch.compile, autocast."""

import math
import shutil
from collections.abc import Callable

import pytest
import torch

import oracle
from microscale.cast import cast
from microscale.tensor import quantize
from oracle_arrays import assert_same, to_numpy
from samples import DTYPES, sample

Cast = Callable[[torch.Tensor], torch.Tensor]

# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int8-tensor"])
def test_the_gradient_is_the_identity(name: str, dtype: torch.dtype) -> None:
    x = sample((3, 40), dtype).requires_grad_()
    upstream = sample((3, 40), dtype, seed=1)
    values = cast(x, name, 0)
    values.backward(upstream)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, upstream)


def test_the_gradient_returns_in_the_inputs_type() -> None:
    x = sample((2, 40)).requires_grad_()
    upstream = torch.ones(2, 40, dtype=torch.float64)
    cast(x, "mxfp4", dtype=torch.float64).backward(upstream)
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def largest_values(x: torch.Tensor, name: str) -> torch.Tensor:
    """For each value of a matrix the largest value that its block could have stored."""
    packed = quantize(x, name)
    largest, scale = packed.format.element.largest, packed.format.scale.name
    scales = packed.scales.float()
    if scale == "e8m0":
        scales = torch.exp2(scales - 127)
    if scale == "e4m3":
        scales = torch.tensor(oracle.ELEMENTS["e4m3"].values)[packed.scales.long()]
    limit = scales * largest
    if packed.tensor_scale.numel():
        limit = limit * packed.tensor_scale
    block = packed.format.block if isinstance(packed.format.block, int) else x.shape[1]
    return limit.repeat_interleave(block, dim=1)[:, : x.shape[1]]


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e4m3", "mxint8", "nvfp4", "int8-token"])
def test_the_clipped_gradient_is_zero_beyond_the_largest_value(name: str) -> None:
    x = sample((6, 40), seed=13)
    x[:, 5] = torch.tensor([1.999, 3.99, -7.8, 63.9, -127.7, 255.5])
    limit = largest_values(x, name)
    x.requires_grad_()
    values = cast(x, name, gradient="clipped")
    assert torch.equal(values, cast(x.detach(), name))
    values.backward(torch.full((6, 40), 3.0))
    assert x.grad is not None
    assert set(x.grad.unique().tolist()) <= {0.0, 3.0}
    # Rounded real scales leave a few float32 steps of doubt about where the range ends.
    slack = 1.0 if name.startswith("mx") else 1 + 2.0**-20
    assert (x.grad[x.abs() <= limit] == 3.0).all()
    assert (x.grad[x.abs() > limit * slack] == 0.0).all()
    # A float32 scale saturates nothing, the others do.
    assert bool((x.grad == 0.0).any()) == (name != "int8-token")


def test_the_clipped_gradient_by_hand() -> None:
    # The scale is 1 and the largest value 6.
    x = torch.tensor([[6.0, -6.0, 6.5, -7.0, 0.0]], requires_grad=True)
    cast(x, "mxfp4", gradient="clipped").sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 1.0, 0.0, 0.0, 1.0]]


def test_the_clipped_gradient_stops_at_nan() -> None:
    x = torch.tensor([[1.0, math.nan], [1.0, 2.0]], requires_grad=True)
    cast(x, "mxfp4", gradient="clipped").sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_the_gradient_passes_through_views_of_a_parameter() -> None:
    weight = torch.nn.Parameter(sample((4, 40)))
    (cast(weight.t(), "mxfp4", 0) * 2).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((4, 40), 2.0))


def test_a_cast_of_no_gradient_needs_none() -> None:
    assert not cast(sample((2, 32)), "mxfp4").requires_grad
    with torch.no_grad():
        assert not cast(sample((2, 32)).requires_grad_(), "mxfp4").requires_grad


# ---------------------------------------------------------------- torch.library, compile, autocast

SPELLED = "even saturate block off off"
OPS = torch.ops.microscale


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int8-channel", "e3m2-5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck_accepts_every_operator(name: str, dtype: torch.dtype) -> None:
    x = sample((3, 40), dtype)
    torch.library.opcheck(OPS.cast.default, (x, name, 1, SPELLED, torch.float32))
    torch.library.opcheck(OPS.cast.default, (x.clone().requires_grad_(), name, 0, SPELLED, dtype))
    torch.library.opcheck(OPS.in_range.default, (x, name, 0, SPELLED))
    torch.library.opcheck(OPS.quantize.default, (x.t(), name, 0, SPELLED))
    stored = list(quantize(x, name, 1).stored)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    torch.library.opcheck(OPS.dequantize.default, (stored, name, 1, compute, 40, dtype))


@pytest.mark.parametrize("name", ["int8-token-bf16", "e2m1-16-pow2", "int4-tensor"])
def test_opcheck_accepts_every_kind_of_scale(name: str) -> None:
    torch.library.opcheck(OPS.quantize.default, (sample((3, 40)), name, 1, SPELLED))


def test_opcheck_accepts_empty_and_zero_dimensional_tensors() -> None:
    for x in (torch.empty(0, 3), torch.empty(3, 0), torch.tensor(1.5)):
        for name in ("mxfp4", "nvfp4", "int8-tensor"):
            torch.library.opcheck(OPS.cast.default, (x, name, 0, SPELLED, torch.float32))
            torch.library.opcheck(OPS.quantize.default, (x, name, 0, SPELLED))


def compiled(function: Cast, backend: str, *, dynamic: bool) -> Cast:
    torch._dynamo.reset()
    wrapped: Cast = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    return wrapped


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int8-channel", "mxfp8_e4m3-rceil"])
def test_a_compiled_cast_gives_the_same_bits(name: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return cast(x * 2, name, 0, rounding="away") + 1

    run = compiled(function, "aot_eager", dynamic=True)
    for shape in ((3, 40), (5, 33), (64, 2), (7, 7)):
        x = sample(shape, seed=sum(shape))
        assert_same(run(x), to_numpy(function(x)))


def test_a_compiled_cast_has_its_gradient() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return (cast(x, "mxfp4", gradient="clipped") * 3).sum()

    run = compiled(function, "aot_eager", dynamic=True)
    for shape in ((2, 40), (3, 33)):
        x = sample(shape, seed=1).requires_grad_()
        y = x.detach().clone().requires_grad_()
        run(x).backward()
        function(y).backward()
        assert x.grad is not None
        assert y.grad is not None
        assert torch.equal(x.grad, y.grad)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_cast_compiled_by_inductor_gives_the_same_bits() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return cast(x + 1, "mxfp6_e3m2")

    run = compiled(function, "inductor", dynamic=True)
    for shape in ((3, 40), (5, 33)):
        x = sample(shape)
        assert_same(run(x), to_numpy(function(x)))


def test_a_compiled_call_refuses_what_an_eager_one_refuses() -> None:
    run = compiled(lambda x: cast(x, "mxfp4", 5), "aot_eager", dynamic=False)
    with pytest.raises(Exception, match="axis 5 does not exist"):
        run(sample((2, 32)))


def test_autocast_changes_nothing() -> None:
    x = sample((3, 40))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = cast(x, "mxfp4")
        product = torch.nn.functional.linear(values, values)
    assert values.dtype == torch.float32
    assert torch.equal(values, cast(x, "mxfp4"))
    assert product.dtype == torch.bfloat16
