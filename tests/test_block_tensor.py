"""`BlockTensor`: what is stored, and that decoding it is casting."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import oracle
from microscale.cast import cast
from microscale.formats import E8M0, NAMED, BlockFormat
from microscale.spelling import get_block_format
from microscale.tensor import dequantize, quantize
from oracle import VARIETY, Options
from oracle_arrays import split_blocks, to_numpy
from samples import DTYPES, awkward, same, sample
from twins import every_element

NAMES = sorted({*VARIETY, *NAMED})


# ---------------------------------------------------------------- decoding is casting


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(40,), (3, 37), (2, 5, 33), (64, 2), (1, 1), ()], ids=str)
def test_decoding_what_was_packed_is_casting(name: str, shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        x = sample(shape, dtype)
        for axis in range(-max(len(shape), 1), max(len(shape), 1)):
            packed = quantize(x, name, axis)
            assert (packed.shape, packed.dtype) == (shape, dtype)
            assert packed.axis == axis % max(len(shape), 1)
            same(dequantize(packed), cast(x, name, axis))


@pytest.mark.parametrize("name", NAMES)
def test_decoding_to_every_type_is_casting_to_it(name: str) -> None:
    for dtype in DTYPES:
        x = sample((3, 37), dtype, seed=1)
        for wanted in DTYPES:
            same(dequantize(quantize(x, name, 0), wanted), cast(x, name, 0, dtype=wanted))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("nonfinite", ["block", "element"])
@pytest.mark.parametrize("rounding", ["even", "away", "zero"])
def test_options_reach_the_codes(name: str, nonfinite: str, rounding: str) -> None:
    x = awkward()
    element = get_block_format(name).element
    for overflow in ("saturate", "nonfinite") if element.has_nan else ("saturate",):
        for flush in ("off", "element", "block"):
            for axis in (0, 1):
                options: dict[str, Any] = {
                    "rounding": rounding,
                    "overflow": overflow,
                    "nonfinite": nonfinite,
                    "flush_subnormals": flush,
                    "prerounding": "bfloat16" if flush == "block" else "off",
                }
                same(dequantize(quantize(x, name, axis, **options)), cast(x, name, axis, **options))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 33), (2, 0, 5)], ids=str)
def test_empty_tensors(name: str, shape: tuple[int, ...]) -> None:
    for axis in range(len(shape)):
        packed = quantize(torch.empty(shape, dtype=torch.bfloat16), name, axis)
        decoded = dequantize(packed)
        assert (decoded.shape, decoded.dtype) == (shape, torch.bfloat16)
        for scales in (packed.scales, packed.tensor_scale):
            if scales.is_floating_point():
                assert (scales == 1).all()


def test_numpy_arrays_can_be_packed() -> None:
    x = sample((3, 40))
    same(dequantize(quantize(x.numpy(), "mxfp4")), cast(x, "mxfp4"))


def test_decoding_into_out() -> None:
    packed = quantize(sample((3, 40)), "mxfp4")
    out = torch.empty(3, 40, dtype=torch.float64)
    assert dequantize(packed, out=out) is out
    same(out, packed.dequantize(torch.float64))


def test_packing_takes_no_gradient() -> None:
    assert not quantize(sample((3, 40)).requires_grad_(), "mxfp4").requires_grad


# ---------------------------------------------------------------- the bits in storage


@pytest.mark.parametrize("name", sorted(every_element()))
def test_every_code_is_stored_as_itself(name: str) -> None:
    element, twin = every_element()[name]
    # Rows of every finite value, the largest first, so that the scale is 1.
    codes = [c for c, v in enumerate(twin.values) if math.isfinite(v) and abs(v) <= twin.largest]
    codes.sort(key=lambda code: -abs(twin.values[code]))
    values = torch.tensor([[twin.values[code] for code in codes]])
    packed = quantize(values, BlockFormat(element, E8M0, len(codes)))
    assert packed.scales.tolist() == [[127]]
    assert packed.codes.dtype == torch.uint8
    assert bytes(packed.codes[0].tolist()) == oracle.pack_row(codes, twin.bits, len(codes))
    same(dequantize(packed), values)


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2"])
def test_nan_and_infinity_have_their_codes(name: str) -> None:
    x = torch.tensor([[math.nan, 1.0, math.inf, -math.inf]])
    packed = quantize(x, name, nonfinite="element")
    decoded = [packed.format.element.values[c] for c in packed.codes[0, :4].tolist()]
    largest = packed.format.element.largest
    ends = [math.inf, -math.inf] if name.endswith("e5m2") else [largest, -largest]
    assert math.isnan(decoded[0])
    assert decoded[2:] == ends
    assert packed.codes[0, 4:].sum() == 0
    poisoned = quantize(x, name)
    assert poisoned.scales.tolist() == [[255]]


@pytest.mark.parametrize("name", sorted(VARIETY))
@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 37), 1), ((37, 3), 0), ((2, 21, 3), 1), ((35,), 0)]
)
def test_rows_are_the_oracles_stream(name: str, shape: tuple[int, ...], axis: int) -> None:
    fmt = VARIETY[name]
    x = sample(shape, seed=3)
    packed = quantize(x, name, axis)
    flat = to_numpy(x).reshape(-1)
    places = split_blocks(shape, axis, fmt.block)
    blocks = oracle.cast_blocks(
        [flat[place].tolist() for place in places], fmt, Options(), compute="float32", out="float32"
    )
    codes = np.zeros(flat.size, np.int64)
    for place, block in zip(places, blocks, strict=True):
        codes[place] = block.codes
    rows = np.moveaxis(codes.reshape(shape), axis, -1).reshape(-1, shape[axis])
    stored = packed.codes.reshape(len(rows), -1).tolist()
    along = fmt.block[1] if isinstance(fmt.block, tuple) else fmt.block
    padding = along if isinstance(along, int) else 1
    for row, held in zip(rows.tolist(), stored, strict=True):
        assert bytes(held) == oracle.pack_row(row, fmt.element.bits, padding)


def test_streams_by_hand() -> None:
    four = quantize(torch.tensor([[4.0, 0.5, -6.0, 1.0]]), "mxfp4")
    assert four.codes[0, :2].tolist() == [0x1 << 4 | 0x6, 0x2 << 4 | 0xF]
    assert four.codes.shape == (1, 16)
    assert four.codes[0, 2:].sum() == 0
    six = quantize(torch.tensor([[4.0, 0.125, -7.5, 1.0]]), "mxfp6_e2m3")
    codes = [0b011000, 0b000001, 0b111111, 0b001000]
    word = sum(code << (6 * place) for place, code in enumerate(codes))
    assert six.codes[0, :3].tolist() == [word & 255, word >> 8 & 255, word >> 16]
    assert six.codes.shape == (1, 24)


@pytest.mark.parametrize(
    ("name", "dtype", "scale"),
    [
        ("mxfp4", torch.uint8, 127),
        ("nvfp4", torch.uint8, 0x7E),
        ("e2m1-16-ue5m3", torch.uint8, 15 << 3),
        ("e2m1-16-pow2", torch.int16, 0),
        ("e2m1-16-bf16", torch.bfloat16, 1.0),
        ("fp4_e2m1-tensor", torch.float32, 1.0),
    ],
)
def test_scales_by_hand(name: str, dtype: torch.dtype, scale: float) -> None:
    packed = quantize(torch.tensor([[6.0] * 16]), name)
    assert packed.scales.dtype == dtype
    assert packed.scales.flatten().tolist() == [scale]
    poisoned = quantize(torch.tensor([[math.nan] * 16]), name)
    nan = {"mxfp4": 255, "nvfp4": 0x7F, "e2m1-16-pow2": -(2**15)}.get(name)
    if nan is not None:
        assert poisoned.scales.flatten().tolist() == [nan]
    assert dequantize(poisoned).isnan().all()


def test_zero_blocks_by_hand() -> None:
    x = torch.zeros(1, 16)
    assert quantize(x, "mxfp4").scales.tolist() == [[0]]
    assert quantize(x, "mxfp4").codes.sum() == 0
    assert quantize(x, "e2m1-16-pow2").scales.tolist() == [[0]]
    assert quantize(x, "int8-tensor").scales.flatten().tolist() == [1.0]
    nvfp4 = quantize(x, "nvfp4")
    assert (nvfp4.scales.tolist(), nvfp4.tensor_scale.tolist()) == ([[0x38]], [1.0])
    assert quantize(-x, "mxfp4").codes.tolist() == [[0x88] * 8 + [0] * 8]


def test_nvfp4_scales_by_hand() -> None:
    x = torch.full((2, 16), 12.0)
    x[0, 0] = 2688.0
    packed = quantize(x, "nvfp4")
    assert packed.tensor_scale.tolist() == [1.0]
    assert packed.tensor_scale.dtype == torch.float32
    assert packed.scales.tolist() == [[0x7E], [0x40]]


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("mxfp4", 4.25),
        ("mxfp6_e2m3", 6.25),
        ("mxfp6_e3m2", 6.25),
        ("mxfp8_e4m3", 8.25),
        ("mxfp8_e5m2", 8.25),
        ("mxint8", 8.25),
    ],
)
def test_bits_per_value(name: str, bits: float) -> None:
    for shape, axis in (((6, 64), 1), ((96, 5), 0), ((2, 32, 3), 1)):
        packed = quantize(sample(shape), name, axis)
        assert packed.storage_bytes * 8 == math.prod(shape) * bits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "axis"), [((3, 37), 1), ((37, 3), 0), ((2, 21, 3), 1), ((), 0)])
def test_storage_is_what_the_format_says(name: str, shape: tuple[int, ...], axis: int) -> None:
    packed = quantize(sample(shape), name, axis)
    assert packed.storage_bytes * 8 == packed.format.storage_bits(shape, axis)
