"""The compiled casts against the reference kernels, bit for bit."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import native_casts
from microscale.cast import cast
from microscale.kernels import reference
from microscale.kernels.native import casts
from microscale.kernels.native.loader import native, usable
from microscale.kernels.plan import plan
from microscale.kernels.storage import Layout
from microscale.rounding import Options
from microscale.spelling import get_block_format
from microscale.tensor import BlockTensor, dequantize, quantize, quantize_both
from samples import same, sample

LIBRARY = native().library
if LIBRARY is None:
    pytest.skip(native().reason, allow_module_level=True)
assert LIBRARY is not None
NAMES = usable(LIBRARY)
PLAIN = ("even", "saturate", "block", "off", "off")


@pytest.fixture(autouse=True, params=NAMES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn."""
    assert LIBRARY is not None
    before = LIBRARY.ms_isa()
    assert LIBRARY.ms_set_isa(NAMES.index(request.param)) == 0
    yield request.param
    LIBRARY.ms_set_isa(before)


@pytest.mark.parametrize("first", range(0, 500, 100))
def test_random_casts_are_those_of_the_reference(first: int, isa: str) -> None:
    assert native_casts.check(first + 10_000 * NAMES.index(isa), 30) == []


@pytest.mark.slow
@pytest.mark.parametrize("first", range(10**6, 10**6 + 20_000, 1000))
def test_many_random_casts_are_those_of_the_reference(first: int, isa: str) -> None:
    assert native_casts.check(first + 10**7 * NAMES.index(isa), 400) == []


def _decoded(name: str, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
    fmt = get_block_format(name)
    outer = torch.full((1 if fmt.tensor_scale else 0,), 0.37)
    stored = (codes, scales, outer, torch.empty(0, dtype=torch.int8))
    layout, length = Layout(fmt, 1, torch.float32), codes.shape[1] * 8 // fmt.element.bits
    found = casts.served(name, *PLAIN)
    assert found is not None
    assert casts.decodes(stored, found, length, torch.float32)
    expected = reference.dequantize(stored, layout, length, dtype)
    same(casts.dequantize(stored, found, layout, length, dtype), expected)


@pytest.mark.parametrize(
    "name",
    ["fp8_e4m3-1", "fp8_e5m2-1", "e2m3-1", "e3m2-1", "e2m1-1", "int8-1", "e4m3fnuz-1", "int3-1"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_code_under_every_scale(name: str, dtype: torch.dtype) -> None:
    bits = get_block_format(name).element.bits
    row = reference.pack(torch.arange(2**bits, dtype=torch.uint8)[None], bits, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 2**bits)
    _decoded(name, row.repeat(256, 1), scales, dtype)


@pytest.mark.parametrize("scale", ["e4m3", "ue5m3"])
def test_every_code_of_a_real_scale(scale: str) -> None:
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    codes = torch.arange(128, dtype=torch.uint8)[None].repeat(256, 1)
    _decoded(f"fp8_e4m3-128-{scale}-tensor_fp32", codes, scales, torch.float32)


def test_every_half_goes_in_and_out() -> None:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    for dtype in (torch.float16, torch.bfloat16):
        values = x.view(dtype)[:, None].repeat(1, 2)
        for name in ("int8-1-fp32", "fp8_e5m2-2"):
            asked, found = plan(values, name, 1, Options()), casts.served(name, *PLAIN)
            assert found is not None
            for to in (torch.float16, torch.bfloat16, torch.float32):
                expected = reference.cast(values, asked, to)
                assert native_casts.equal(casts.cast(values, found, 1, to), expected)


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "nvfp4", "int8-token", "int8-channel"])
@pytest.mark.parametrize("axis", [0, 1])
def test_out_of_every_kind(name: str, axis: int) -> None:
    x = sample((66, 130))
    expected = cast(x, name, axis)
    wide = torch.zeros(66, 400)
    outs = {
        "contiguous": torch.empty(66, 130),
        "transposed": torch.empty(130, 66).t(),
        "stepped": wide[:, 1:391:3],
        "itself": x.clone(),
        "itself, transposed": x.t().clone().t(),
    }
    for how, out in outs.items():
        given = out if how.startswith("itself") else x
        version = out._version
        assert cast(given, name, axis, out=out) is out
        assert torch.equal(out, expected), how
        assert out._version > version
    assert wide[:, 0::3].count_nonzero() == wide[:, 2::3].count_nonzero() == 0


def test_out_that_overlaps_the_input() -> None:
    memory = sample((4000,))
    expected = cast(memory[:3200].reshape(100, 32).clone(), "mxfp4")
    out = memory[7:3207].reshape(100, 32)
    cast(memory[:3200].reshape(100, 32), "mxfp4", out=out)
    assert torch.equal(out, expected)


def test_memory_beside_the_output_is_left_alone() -> None:
    for length in (1, 5, 31, 33, 100):
        memory = torch.full((3, 200), 7.0)
        cast(sample((3, length)), "mxfp8_e4m3", out=memory[:, 20 : 20 + length])
        assert (memory[:, :20] == 7).all()
        assert (memory[:, 20 + length :] == 7).all()


def test_a_negated_view_is_read_as_what_it_is() -> None:
    x = torch.complex(sample((2, 32)), sample((2, 32), seed=1)).conj().imag
    assert x.is_neg()
    same(cast(x, "mxfp4"), cast(x.resolve_neg(), "mxfp4"))


def test_what_the_core_does_not_serve_runs_on_the_reference() -> None:
    unserved = (
        *("mxfp4-pow2", "int8-token-e8m0-mse", "mxfp4-2x4", "int8-channel-zero_point"),
        *("int8full-32", "mxfp4-e5m0", "e4m3-tensor-unit", "mxfp4-seven_quarters"),
    )
    for name in unserved:
        assert casts.served(name, *PLAIN) is None
        x = sample((3, 40))
        same(cast(x, name), reference.cast(x, plan(x, name, 1, Options()), torch.float32))
    assert casts.served("mxfp4", *PLAIN[:-1], "bfloat16") is None
    x = sample((3, 40), torch.float64)
    expected = reference.cast(x, plan(x, "mxfp4", 1, Options()), torch.float64)
    same(cast(x, "mxfp4"), expected)


def test_packed_parts_that_do_not_fit_are_not_read() -> None:
    q = quantize(sample((4, 64)), "mxfp4")
    found = casts.served("mxfp4", *PLAIN)
    assert found is not None
    codes, scales, *rest = q.stored
    assert casts.decodes(q.stored, found, 64, torch.float32)
    for broken in (
        (codes[:, :-1], scales),
        (codes, scales[:, :-1]),
        (codes, scales[:3]),
        (codes, scales.float()),
        (codes[0], scales),
    ):
        assert not casts.decodes((*broken, rest[0], rest[1]), found, 64, torch.float32)


def test_views_of_packed_tensors_decode() -> None:
    q = quantize(sample((6, 5, 64)), "mxfp6_e2m3")
    whole = dequantize(q)
    views: list[Callable[[Tensor], Tensor]] = [
        lambda t: t[2],
        lambda t: t[1:5:2, 3],
        lambda t: t.transpose(1, 2),
    ]
    for view in views:
        part = view(q)
        assert isinstance(part, BlockTensor)
        same(dequantize(part), view(whole).contiguous())


def test_more_dimensions_than_the_core_walks() -> None:
    x = sample((2, 1, 3, 1, 2, 1, 2, 1, 2, 33)).transpose(0, -1)
    for name in ("mxfp4", "int8-token"):
        asked = plan(x, name, 0, Options())
        same(cast(x, name, 0), reference.cast(x, asked, torch.float32))
        q = quantize(x, name, 0)
        same(dequantize(q), cast(x, name, 0))


def test_long_tensors_in_many_threads() -> None:
    x = sample((300, 1000))
    threads = torch.get_num_threads()
    for name in ("mxfp8_e4m3", "nvfp4", "int8-tensor", "int8-channel"):
        for axis in (0, 1):
            values = []
            for count in (1, 2, 7):
                torch.set_num_threads(count)
                values.append(cast(x, name, axis))
            torch.set_num_threads(threads)
            expected = reference.cast(x, plan(x, name, axis, Options()), torch.float32)
            for found in values:
                same(found, expected)


def test_blocks_longer_than_a_batch() -> None:
    x = sample((3, 9001))
    for name in ("int5-4097", "fp8_e4m3-5000-bf16", "e2m3-2049-e8m0-mse", "fp4_e2m1-32768"):
        for axis in (0, 1):
            y = x.t() if axis == 0 else x
            asked = plan(y, name, axis, Options())
            same(cast(y, name, axis), reference.cast(y, asked, torch.float32))
            q, expected = quantize(y, name, axis), reference.quantize(y, asked)
            for part, wanted in zip(q.stored, expected, strict=True):
                same(part, wanted)
            assert math.prod(q.codes.shape)


BOTH = (
    *("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8", "nvfp4"),
    *("fp8_e4m3-128-fp32", "mxfp4-mse", "e2m3-33", "int8-token", "fp8_e4m3-tensor", "mxfp4-2x4"),
)
"""Formats in tiles of one read, and some whose axes are packed one after the other."""


@pytest.mark.parametrize("fmt", BOTH)
def test_both_axes_at_once(fmt: str) -> None:
    shapes = ((130, 1100), (3, 64, 96), (1, 64), (64, 1), (5, 33), (2, 3, 40, 33), (256, 512))
    for shape in shapes:
        x = sample(shape)
        for values in (x, x.bfloat16(), x.half(), x.transpose(-1, -2), x.flip(0)[..., ::2]):
            for axes in ((-1, -2), (-2, -1), (0, -1)):
                if values.dim() != 2 or axes != (0, -1):
                    _same_both(values, fmt, axes)


def _same_both(x: Tensor, fmt: str, axes: tuple[int, int], **options: object) -> None:
    made = quantize_both(x, fmt, axes, **options)  # type: ignore[arg-type]
    for q, axis in zip(made, axes, strict=True):
        alone = quantize(x, fmt, axis, **options)  # type: ignore[arg-type]
        assert q.axis == alone.axis
        for part, wanted in zip(q.stored, alone.stored, strict=True):
            same(part, wanted)


@pytest.mark.parametrize("fmt", ["mxfp8_e4m3", "nvfp4", "int8-token"])
def test_both_axes_with_every_option(fmt: str) -> None:
    x = sample((130, 600))
    x[3, 5], x[70, 500], x[100] = float("nan"), float("inf"), 0.0
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        _same_both(x, fmt, (-1, -2), rounding="stochastic", seed=11)
        _same_both(x, fmt, (-1, -2), rounding="away", nonfinite="element")
        _same_both(x, fmt, (0, 1), flush_subnormals="block")
        _same_both(x, fmt, (0, 1), prerounding="bfloat16")
    torch.set_num_threads(threads)


def test_large_outputs_go_past_the_caches_unharmed(isa: str) -> None:
    """Streamed stores: whole lines and what is beside them, ragged rows, several threads."""
    if isa in {"baseline", "avx2"}:
        pytest.skip(f"{isa} streams nothing")
    memory = torch.empty(2**22 + 2**15)
    memory = memory[(-memory.data_ptr() // 4) % 16 :]
    threads = torch.get_num_threads()
    for fmt in ("mxfp8_e4m3", "nvfp4", "int8-channel", "fp8_e4m3-128-fp32"):
        for rows, columns, shift in ((1025, 4096, 0), (1025, 4096, 1), (1031, 4095, 0)):
            x = sample((rows, columns))
            out = memory[shift : shift + x.numel()].view(rows, columns)
            for axis in (0, 1):
                expected = cast(x, fmt, axis)
                for count in (1, 2, 5):
                    torch.set_num_threads(count)
                    memory.fill_(7.0)
                    cast(x, fmt, axis, out=out)
                    assert torch.equal(out, expected)
                    assert (memory[:shift] == 7).all()
                    assert (memory[shift + x.numel() :] == 7).all()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("fmt", ["mxfp6_e2m3", "nvfp4", "int8-channel", "fp8_e4m3-128-fp32"])
def test_decoding_into_what_is_given(fmt: str) -> None:
    x = sample((66, 257))
    for axis in (0, 1):
        q, expected = quantize(x, fmt, axis), cast(x, fmt, axis)
        wide = torch.full((66, 600), 7.0)
        outs = [torch.empty(66, 257), torch.empty(257, 66).t(), wide[:, 1:515:2]]
        outs += [torch.empty(66, 257, dtype=t) for t in (torch.float16, torch.bfloat16)]
        for out in (*outs, torch.empty(66, 257, dtype=torch.float64)):
            version = out._version
            assert dequantize(q, out=out) is out
            assert torch.equal(out, dequantize(q, out.dtype))
            assert out._version > version
        assert torch.equal(outs[0], expected)
        assert (wide[:, ::2] == 7).all()
        assert (wide[:, 515:] == 7).all()


def test_decoding_over_the_codes_themselves() -> None:
    q = quantize(sample((64, 64)), "mxint8")
    memory, expected = torch.zeros(64, 64), dequantize(q)
    codes = memory.view(torch.uint8).flatten()[5000 : 5000 + 64 * 64].view(64, 64)
    codes.copy_(q.codes)
    inside = BlockTensor((codes, *q.stored[1:]), q.packing, q.shape, q.dtype)
    same(dequantize(inside, out=memory), expected)


@pytest.mark.slow
def test_more_values_than_32_bits_count() -> None:
    """8 GB: an index that wrapped would leave the end as it was, or write over the beginning."""
    x = torch.zeros(2**31 + 64, dtype=torch.bfloat16)
    x[:64] = x[-64:] = sample((64,)).bfloat16()
    expected = cast(x[-64:].clone(), "mxfp4")
    cast(x, "mxfp4", out=x)
    assert torch.equal(x[:64], expected)
    assert torch.equal(x[-64:], expected)
    assert not x[64:-64].view(torch.int64).any()
    q = quantize(x, "mxfp4")
    assert torch.equal(dequantize(q, out=x)[-64:], expected)
