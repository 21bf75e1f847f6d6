"""Zero points, full integers, biases and scales of few exponents: what formats can say besides.

Values are held against the exact oracle by `test_cast.py` and `test_block_tensor.py`, whose list of
formats names some of each.
"""

import math

import pytest
import torch

from microscale.cast import cast
from microscale.errors import MicroscaleError
from microscale.formats import INT8, MXFP4, exponent_scale, float_format
from microscale.spelling import get_block_format, get_format
from microscale.tensor import quantize
from samples import same, sample


def test_a_zero_point_by_hand() -> None:
    # 4 bits hold 16 codes; from -1 to 14 in steps of 1, so code -8 stands for -1 and -7 for 0.
    x = torch.tensor([[-1.0, 0.0, 0.4, 0.5, 1.5, 14.0, 13.5, 3.0]])
    packed = quantize(x, "int4-8-zero_point")
    assert packed.zero_point.tolist() == [[-7]]
    assert packed.scales.tolist() == [[4.0]]  # elements are k / 4
    same(packed.dequantize(), torch.tensor([[-1.0, 0.0, 0.0, 0.0, 2.0, 14.0, 14.0, 3.0]]))


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_whole_range_of_codes_is_used(bits: int) -> None:
    x = torch.linspace(0.0, 1.0, 2**bits).mul(3).sub(1)[None]
    packed = quantize(x, f"int{bits}-token-zero_point")
    assert len(packed.dequantize().unique()) == 2**bits


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_values_of_one_sign_need_half_the_steps(sign: float) -> None:
    x = sign * torch.rand(64, 32, generator=torch.Generator().manual_seed(0))
    plain, spanned = (cast(x, f) for f in ("int4-32-fp32", "int4-32-zero_point"))
    errors = [(x - values).square().mean().sqrt() for values in (plain, spanned)]
    assert errors[1] < 0.55 * errors[0]


@pytest.mark.parametrize("name", ["int8-channel-zero_point", "int4-16-zero_point"])
def test_zero_stays_zero(name: str) -> None:
    x = sample((8, 32)).abs() + 5
    x[:, ::3] = 0.0
    assert (cast(x, name)[:, ::3] == 0).all()


def test_the_clipped_gradient_ends_where_codes_do() -> None:
    # bfloat16 rounds the scale of 1 + 2^-10 down, so the greatest value is beyond the last code
    # by less than half a step; and one beyond by more.
    x = torch.tensor([[0.0, 255.0 * (1 + 2.0**-10)]], requires_grad=True)
    cast(x, "int8-token-bf16-zero_point", gradient="clipped").sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 1.0]]
    y = torch.tensor([[0.0, 255.0 * (1 + 2.0**-8 - 2.0**-12)]], requires_grad=True)
    assert quantize(y.detach(), "int8-token-bf16-zero_point").scales.item() == 64.0 * 1.0
    cast(y, "int8-token-bf16-zero_point", gradient="clipped").sum().backward()
    assert y.grad is not None
    assert y.grad.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("spelling", "says"),
    [
        ("mxfp4-zero_point", "a zero point is for integers such as int8, not for e2m1"),
        ("int8full-32-zero_point", "a zero point is for integers such as int8, not for int8full"),
        ("int8-32-e8m0-zero_point", "needs a real-valued scale of its own, such as fp32, not e8m0"),
        ("int4-16-e4m3-tensor_fp32-zero_point", "needs a real-valued scale of its own"),
        ("int8-channel-zero_point-zero_point", "names two of one kind"),
        ("int8-channel-zeropoint", "Did you mean zero_point"),
        ("mxfp4-unit-ceil", "scale rule ceil does not apply to the scale format unit; use floor"),
        ("mxfp4-e9m0", "option 'e9m0' is not known"),
        ("mxfp4-e1m0", "option 'e1m0' is not known"),
        ("fp8_e4m3-channel-e5m0-amax", "scale rule amax does not apply to the scale format e5m0"),
        ("mxfp4-0x32", "block size 0 is not positive"),
        ("e4m3full", "is not known"),
        ("int9full", "integers of 2 to 8 bits"),
    ],
)
def test_what_no_format_has_is_refused_by_name(spelling: str, says: str) -> None:
    with pytest.raises(MicroscaleError) as raised:
        get_format(spelling)
    assert says in str(raised.value)


def test_full_integers_reach_their_most_negative_code() -> None:
    x = torch.tensor([[-1.9999, 1.9999, -1.98, 0.5]])
    assert cast(x, "int8full-4").tolist() == [[-2.0, 127 / 64, -127 / 64, 0.5]]
    assert quantize(x, "int8full-4").codes[0, 0] == 0x80
    assert cast(x, "mxint8").tolist()[0][0] == -127 / 64
    assert INT8.lowest == -INT8.largest


# ---------------------------------------------------------------- biases and scales


@pytest.mark.parametrize("bias", [5, 7, 8, 11])
def test_a_fixed_bias_needs_no_scale(bias: int) -> None:
    element = float_format(4, 3, bias=bias)
    x = sample((6, 50))
    got = cast(x, f"{element.name}-tensor-unit")
    # The grid of another bias is the usual one, moved by a power of two.
    moved = cast(x * 2.0 ** (bias - 7), "e4m3-tensor-unit") * 2.0 ** (7 - bias)
    same(got, moved)
    assert got.abs().max() <= element.largest


def test_a_flexible_bias_is_a_power_of_two_for_the_tensor() -> None:
    x = sample((6, 50)) / 1000
    scale = int(quantize(x, "e4m3-tensor-pow2").scales)
    flexible = cast(x, "e4m3-tensor-pow2")
    same(flexible, cast(x, f"{float_format(4, 3, bias=7 - scale).name}-tensor-unit"))


@pytest.mark.parametrize("element", ["e2m1", "e4m3", "int8", "e3m2"])
def test_no_shared_scale_is_a_block_of_one(element: str) -> None:
    x = sample((5, 33))
    got = cast(x, f"{element}-1-pow2")
    each = torch.stack([cast(value.reshape(1), f"{element}-32-pow2") for value in x.flatten()])
    same(got, each.reshape(x.shape))
    # Every value has an exponent of its own, so the relative error has one bound.
    fmt = get_block_format(f"{element}-1-pow2")
    gap = 2.0**-(fmt.element.mantissa_bits)
    assert ((x - got).abs() <= gap * x.abs()).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_scales_of_few_exponents_clamp(bits: int) -> None:
    scale = exponent_scale(bits)
    assert scale.exponents is not None
    low, high = scale.exponents
    assert high - low + 2 == 2**bits
    x = torch.tensor([[4 * 2.0**k] for k in range(-126, 125)])
    packed = quantize(x, f"mxfp4-{scale}")
    wanted = torch.arange(-126, 125).clamp(low, high) - low
    assert packed.scales.flatten().tolist() == wanted.tolist()
    poisoned = quantize(torch.tensor([[math.nan]]), f"mxfp4-{scale}")
    assert poisoned.scales.item() == 2**bits - 1
    assert poisoned.dequantize().isnan().all()
    zero = quantize(torch.zeros(1, 4), f"mxfp4-{scale}")
    assert (zero.scales.item(), zero.dequantize().tolist()) == (0, [[0.0] * 4])
    bits_per_value = get_block_format(f"mxfp4-{scale}").bits_per_value
    assert bits_per_value == MXFP4.element.bits + bits / 32
