"""The profile `paper` against its model, the library of the authors of arXiv 2310.10537.

`library_cast` restates that library's algorithm where it is right, in float64 and with exact
exponents. Each test of a difference holds one deviation that docs/peers.md lists: what the library
does as a restatement or a number, and what is done here.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from microscale import functional
from microscale.cast import cast
from microscale.convert import convert
from microscale.functional.vector import deliver
from microscale.policy import Policy
from microscale.spelling import get_block_format
from microscale.tensor import quantize
from oracle_arrays import to_numpy

Floats = NDArray[np.float64]


class Parameters(NamedTuple):
    """An element as the library describes it; `bits` count sign, leading bit and mantissa."""

    exponent_bits: int
    bits: int
    emax: int
    largest: float


ELEMENTS = {
    "mxfp8_e4m3": Parameters(4, 5, 8, 448.0),
    "mxfp8_e5m2": Parameters(5, 4, 15, 57344.0),
    "mxfp6_e2m3": Parameters(2, 5, 2, 7.5),
    "mxfp6_e3m2": Parameters(3, 4, 4, 28.0),
    "mxfp4": Parameters(2, 3, 2, 6.0),
    "mxint8": Parameters(0, 8, 0, 127 / 64),
}
by_name = pytest.mark.parametrize("name", ELEMENTS)
LARGEST_BFLOAT16 = 255 * 2.0**120


# ---------------------------------------------------------------- the library, restated


def binade(x: Floats) -> Floats:
    """The exponent of each magnitude, exactly; of 0, that of 1."""
    _, exponent = np.frexp(np.where(x == 0, 1.0, x))
    return np.asarray(exponent - 1, np.float64)


def to_integer(x: Floats, rounding: str) -> Floats:
    magnitude: Floats = np.abs(x)
    rounded = {
        "away": np.floor(magnitude + 0.5),
        "zero": np.floor(magnitude),
        "even": np.rint(magnitude),
    }[rounding]
    return np.sign(x) * rounded


def to_bfloat16(x: Floats, rounding: str) -> Floats:
    step = 2.0 ** (np.maximum(binade(x), -126) - 7)
    rounded = to_integer(x / step, rounding) * step
    beyond = np.abs(rounded) > LARGEST_BFLOAT16
    return np.where(beyond, np.sign(rounded) * np.inf, rounded)


def library_cast(x: Tensor, name: str, axis: int = -1, rounding: str = "away") -> Floats:
    """Cast along `axis`: bfloat16 first, blocks of 32 from the first value, zeros to fill up."""
    with np.errstate(invalid="ignore", over="ignore"):
        rows = to_bfloat16(np.moveaxis(to_numpy(x), axis, -1), rounding)
        length = rows.shape[-1]
        filled = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -length % 32)])
        blocks = filled.reshape(*rows.shape[:-1], -1, 32)
        values = _cast_blocks(blocks, ELEMENTS[name], rounding).reshape(filled.shape)
    return np.asarray(np.moveaxis(values[..., :length], -1, axis), np.float64)


def _cast_blocks(blocks: Floats, element: Parameters, rounding: str) -> Floats:
    amax = np.abs(blocks).max(-1, keepdims=True)  # NaN where the block holds one
    exponent = np.where(amax == 0, -126, binade(amax))
    blocks = blocks * (exponent > -127)
    shared = np.maximum(exponent - element.emax, -127)
    shared = np.where(np.isfinite(amax), shared, np.nan)
    quotient = blocks / 2.0**shared
    private = np.maximum(binade(quotient), 2 - 2.0 ** (element.exponent_bits - 1))
    if not element.exponent_bits:
        private = np.zeros_like(quotient)
    step = 2.0 ** (private - (element.bits - 2))
    rounded = to_integer(quotient / step, rounding) * step
    return np.asarray(np.clip(rounded, -element.largest, element.largest) * 2.0**shared)


# ---------------------------------------------------------------- the same bits


def laws(**further: str) -> dict[str, Any]:
    operand = Policy.named("paper", "mxfp4", "mxfp4", **further).forward.weight
    assert operand is not None
    return operand.laws


def samples() -> dict[str, Tensor]:
    """Rows of 32 float32: every bfloat16, ordinary values, ties, edges of binades, the extremes."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    halves = codes.view(torch.bfloat16).float()
    normal = torch.randn((500, 32), generator=generator)
    spread = normal * torch.exp2(torch.randint(-9, 9, normal.shape, generator=generator))
    far = spread * torch.exp2(torch.randint(-149, 118, (500, 1), generator=generator))
    ties = (normal * 2**7).round() / 2**7 + 2.0**-8
    powers = torch.exp2(torch.arange(-126.0, 128.0))
    edges = torch.stack([powers, torch.nextafter(powers, torch.zeros(())), powers * 1.99609375], 1)
    edges = torch.cat([edges, edges / 3, edges / 7, -edges / 64, edges[:, :2] / 1000], 1)
    odd = spread[:60].clone()
    odd[::6, 3], odd[1::6, 4], odd[2::6, 5] = torch.nan, torch.inf, -torch.inf
    odd[3::6, 6], odd[4::6, 7] = 3.4e38, LARGEST_BFLOAT16
    return {
        "every bfloat16": halves.reshape(-1, 32),
        "every bfloat16, mixed": halves[torch.randperm(2**16, generator=generator)].reshape(-1, 32),
        "spread": spread,
        "far": far,
        "ties": ties,
        "edges": edges,
        "not finite": odd,
    }


@by_name
@pytest.mark.parametrize("rounding", ["away", "even", "zero"])
def test_the_profile_casts_as_the_library_does(name: str, rounding: str) -> None:
    options = laws(rounding=rounding)
    for kind, x in samples().items():
        ours, theirs = to_numpy(cast(x, name, **options)), library_cast(x, name, -1, rounding)
        np.testing.assert_array_equal(ours, theirs, err_msg=kind)
        if ELEMENTS[name].exponent_bits and kind in {"spread", "ties"}:
            # Where no zero is given or made by flushing: see test_difference_negative_zero...
            np.testing.assert_array_equal(np.signbit(ours), np.signbit(theirs), err_msg=kind)


@by_name
def test_blocks_run_along_any_axis_and_the_last_one_may_be_short(name: str) -> None:
    x = samples()["spread"][:12].reshape(2, 3, 64)[:, :, :45]
    for axis in range(3):
        values = to_numpy(cast(x, name, axis, **laws()))
        np.testing.assert_array_equal(values, library_cast(x, name, axis))


def exact_sums(seed: int, *shape: int) -> Tensor:
    """Values of so few bits that every sum of products below is exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4096, 4096, shape, generator=generator) / 1024


@by_name
def test_linear_layers_agree(name: str) -> None:
    layer = nn.Linear(72, 9, bias=False)
    layer.weight.data = exact_sums(1, 9, 72)
    x = exact_sums(2, 4, 5, 72)
    products = library_cast(x, name) @ library_cast(layer.weight, name).T
    convert(layer, f"paper:{name}", verbose=False)
    np.testing.assert_array_equal(to_numpy(layer(x)), to_bfloat16(products, "away"))


@by_name
def test_products_of_two_activations_agree(name: str) -> None:
    left, right = exact_sums(3, 2, 7, 40), exact_sums(4, 2, 40, 6)
    products = library_cast(left, name, -1) @ library_cast(right, name, -2)
    got = functional.matmul(left, right, policy=Policy.parse(f"paper:{name}"))
    np.testing.assert_array_equal(to_numpy(got), to_bfloat16(products, "away"))


@by_name
def test_convolutions_agree(name: str) -> None:
    layer = nn.Conv2d(40, 5, 3, padding=1, bias=False)
    layer.weight.data = exact_sums(5, 5, 40, 3, 3)
    x = exact_sums(6, 2, 40, 6, 7)
    left, right = (torch.from_numpy(library_cast(t, name, 1)) for t in (x, layer.weight))
    products = to_numpy(F.conv2d(left, right, padding=1))
    convert(layer, f"paper:{name}", verbose=False)
    np.testing.assert_array_equal(to_numpy(layer(x)), to_bfloat16(products, "away"))


@by_name
def test_transposed_convolutions_agree(name: str) -> None:
    layer = nn.ConvTranspose2d(40, 5, 3, stride=2, bias=False)
    layer.weight.data = exact_sums(7, 40, 5, 3, 3)
    x = exact_sums(8, 2, 40, 4, 5)
    left = torch.from_numpy(library_cast(x, name, 1))
    right = torch.from_numpy(library_cast(layer.weight, name, 0))
    products = to_numpy(F.conv_transpose2d(left, right, stride=2))
    convert(layer, f"paper:{name}", verbose=False)
    np.testing.assert_array_equal(to_numpy(layer(x)), to_bfloat16(products, "away"))


def test_tables_are_left_alone() -> None:
    table = nn.Embedding(7, 32)
    before = table.weight.detach().clone()
    convert(nn.Sequential(table, nn.Linear(32, 4)), "paper:mxfp4", verbose=False)
    assert torch.equal(table(torch.arange(7)), before)


# ---------------------------------------------------------------- deviations: of a cast


def test_difference_log2_of_the_largest_value() -> None:
    """The library takes floor(log2(amax)) in float32; bfloat16 first hides that."""
    below = np.nextafter(np.float32(1024), np.float32(0))
    assert math.frexp(below)[1] - 1 == 9
    assert np.floor(np.log2(below)) == 10
    x = torch.tensor([[float(below), 1.0]])
    assert quantize(x, "mxfp4").scales.item() - 127 == 9 - 2
    assert cast(x, "mxfp4", rounding="away").tolist() == [[768.0, 0.0]]  # the library's is 1024
    assert cast(x, "mxfp4", **laws()).tolist() == [[1024.0, 0.0]]


def test_difference_log2_of_an_element() -> None:
    """The same for the exponent of an element, which shows when it is truncated."""
    below = float(np.nextafter(np.float32(256), np.float32(0)))
    x = torch.tensor([[below, 448.0]])
    assert cast(x, "mxfp8_e4m3", rounding="zero").tolist() == [[240.0, 448.0]]
    step = 2.0 ** (np.floor(np.log2(np.float32(below))) - 3)
    assert np.floor(below / step) * step == 224.0


@pytest.mark.parametrize("rounding", ["away", "even"])
def test_difference_just_below_a_half(rounding: str) -> None:
    """The library adds a half and takes the floor, in float32."""
    below = np.nextafter(np.float32(0.5), np.float32(0))
    assert np.floor(below + np.float32(0.5)) == 1
    x = torch.tensor([[1.0, float(below) / 64]])
    assert cast(x, "mxint8", rounding=rounding).tolist() == [[1.0, 0.0]]  # there 1/64


@by_name
def test_difference_negative_zero_keeps_its_sign(name: str) -> None:
    """The library multiplies by sign(-0.0), which is 0; so flushed blocks lose signs too."""
    zero = cast(torch.tensor([[-0.0, 1.0]]), name, **laws())[0, 0]
    assert zero == 0
    assert bool(zero.signbit()) == get_block_format(name).element.has_negative_zero


def test_difference_e4m3_has_no_infinity() -> None:
    """Without saturation the library's overflow is infinity in every format; OFP8's is NaN."""
    x = torch.tensor([[500.0, 1.0]])
    values = cast(x, "mxfp8_e4m3", overflow="nonfinite")
    assert values[0, 0].isnan()
    assert values[0, 1] == 1
    assert cast(x, "mxfp8_e4m3", **laws()).tolist() == [[448.0, 1.0]]


def test_difference_subnormals_follow_the_argument() -> None:
    """The paper zeroes single float32 subnormals; its library blocks of them, if told to."""
    tiny = 2.0**-127
    x = torch.tensor([[tiny, 2.0**-126], [tiny, 2.0**-128]])
    kept = cast(x, "mxfp8_e5m2")
    assert torch.equal(kept, x)
    assert cast(x, "mxfp8_e5m2", **laws()).tolist() == [[tiny, 2.0**-126], [0.0, 0.0]]
    paper = cast(x, "mxfp8_e5m2", **laws(flush_subnormals="element"))
    assert paper.tolist() == [[0.0, 2.0**-126], [0.0, 0.0]]


def test_difference_the_block_is_part_of_the_format() -> None:
    """The library's default is one scale for the whole axis."""
    assert all(get_block_format(name).block == 32 for name in ELEMENTS)
    x = torch.tensor([[4.0] * 32 + [0.03125] * 32])
    assert torch.equal(cast(x, "mxfp4", **laws()), x)
    assert cast(x, "mxfp4-token-e8m0", **laws())[0, -1] == 0


def test_difference_a_zero_block_has_scale_code_zero() -> None:
    """There it has the exponent -126 - emax, clamped: code 1 for MXINT8; no value shows it."""
    for name in ELEMENTS:
        assert quantize(torch.zeros(1, 32), name, **laws()).scales.item() == 0


# ---------------------------------------------------------------- deviations: of layers


def test_difference_convolutions_round_as_they_are_told() -> None:
    """The library's convolutions pass no rounding on, so operands are rounded half away always."""
    layer = nn.Conv1d(2, 1, 1, bias=False)
    layer.weight.data = torch.ones(1, 2, 1)
    x = torch.tensor([[[4.0], [1.25]]])
    for rounding, result in (("even", 4.0 + 1.0), ("away", 4.0 + 1.5)):
        policy = Policy.named("paper", "mxfp4", "mxfp4", rounding=rounding)
        convert(layer, policy, verbose=False)
        assert layer(x).item() == result


def test_difference_no_block_straddles_two_groups() -> None:
    """The library casts all channels of the input together, whatever the groups."""
    layer = nn.Conv1d(4, 2, 1, groups=2, bias=False)
    layer.weight.data = torch.ones(2, 2, 1)
    x = torch.tensor([[[4.0], [1.0], [0.015625], [0.015625]]])
    convert(layer, "paper:mxfp4", verbose=False)
    assert layer(x).flatten().tolist() == [5.0, 0.03125]
    assert library_cast(x, "mxfp4", 1).flatten().tolist() == [4.0, 1.0, 0.0, 0.0]


def test_difference_the_bias_is_added_before_the_only_rounding() -> None:
    """The library's linear layers round product, bias and sum."""
    layer = nn.Linear(2, 1)
    layer.weight.data, layer.bias.data = torch.ones(1, 2), torch.tensor([-1.0])
    convert(layer, "paper:mxfp8_e4m3", verbose=False)
    assert layer(torch.tensor([256.0, 1.0])).item() == 256.0
    product = to_bfloat16(np.array([257.0]), "away")
    assert product.tolist() == [258.0]
    assert to_bfloat16(product - 1.0, "away").tolist() == [258.0]


def test_difference_vector_operations_do_not_overflow() -> None:
    """The library's results beyond the largest bfloat16 are infinite: masks of -3.4e38 too."""
    policy = Policy.parse("paper:mxfp8_e4m3")
    assert deliver(torch.tensor([3.4e38]), policy).item() == LARGEST_BFLOAT16
    assert deliver(torch.tensor([math.inf]), policy).item() == math.inf


def test_difference_a_vector_operation_rounds_once() -> None:
    """The library rounds every step of a softmax or a norm: difference, power, sum, quotient."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Softmax(-1))
    model[0].weight.data = torch.eye(8)
    x = torch.arange(8.0)[None] / 4
    convert(model, "paper:mxfp8_e4m3", verbose=False)
    once = to_bfloat16(to_numpy(x.softmax(-1)), "away")
    np.testing.assert_array_equal(to_numpy(model(x)), once)
    powers = to_bfloat16(np.exp(to_numpy(x - x.max())), "away")
    steps = to_bfloat16(powers / to_bfloat16(powers.sum(keepdims=True), "away"), "away")
    assert (steps != once).any()


def test_difference_ties_of_results_follow_the_profile() -> None:
    x = torch.tensor([257.0, -257.0, 259.0, 1.0])
    assert deliver(x, Policy.parse("paper:mxfp4")).tolist() == [258.0, -258.0, 260.0, 1.0]
    even = Policy.named("paper", "mxfp4", "mxfp4", vector="bfloat16")
    assert deliver(x, even).tolist() == [256.0, -256.0, 260.0, 1.0]


def test_difference_output_sizes_of_transposed_convolutions() -> None:
    """The library's module cannot be given one."""
    layer = nn.ConvTranspose2d(4, 3, 3, stride=2)
    convert(layer, "paper:mxfp8_e4m3", verbose=False)
    assert layer(torch.randn(1, 4, 5, 5), output_size=(12, 12)).shape == (1, 3, 12, 12)


def test_gradients_of_a_linear_layer_are_the_library_s() -> None:
    """Blocks of the weight's gradient run along the sequence of one sample."""
    policy = Policy.named("paper", "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2")
    x, w = torch.randn(3, 40, 64), nn.Parameter(torch.randn(48, 64))
    x.requires_grad_()
    e = torch.randn(3, 40, 48)
    functional.linear(x, w, policy=policy).backward(e)
    of_input = library_cast(e, "mxfp6_e3m2") @ library_cast(w.detach(), "mxfp4", 0)
    left = library_cast(x.detach(), "mxfp6_e2m3", 1)
    of_weight = np.einsum("btn,btk->nk", library_cast(e, "mxfp6_e3m2", 1), left)
    assert x.grad is not None
    assert w.grad is not None
    np.testing.assert_allclose(to_numpy(x.grad), of_input, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(to_numpy(w.grad), of_weight, rtol=1e-5, atol=1e-4)


def test_difference_gradients_of_convolutions_sum_over_positions_of_a_sample() -> None:
    """The library takes blocks along the batch; each has its own formats here."""
    policy = Policy.named("paper", "mxfp4", "mxfp4", "mxfp6_e3m2")
    layer = nn.Conv1d(8, 8, 1, bias=False)
    convert(layer, policy, verbose=False)
    x, e = torch.randn(3, 8, 40), torch.randn(3, 8, 40)
    layer(x).backward(e)
    left, right = library_cast(x, "mxfp4", 2), library_cast(e, "mxfp6_e3m2", 2)
    expected = np.einsum("bnt,bkt->nk", right, left)
    assert layer.weight.grad is not None
    np.testing.assert_allclose(to_numpy(layer.weight.grad[..., 0]), expected, rtol=1e-5, atol=1e-4)


def test_difference_gradients_are_not_rounded_between_operations() -> None:
    """The library rounds what each backward product gives to bfloat16."""
    policy = Policy.named("paper", "mxfp4", "mxfp4", "mxfp4")
    x, w = torch.randn(4, 64, requires_grad=True), nn.Parameter(torch.randn(48, 64))
    functional.linear(x, w, policy=policy).backward(torch.randn(4, 48))
    assert x.grad is not None
    assert (x.grad != x.grad.bfloat16().float()).any()
