"""`cast` on tensors: axes, layouts, types, options.

Which bits come out is settled in test_cast_exhaustive.py; here the whole verb is held against the
exact oracle on small tensors of every shape.
"""

import math
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import oracle
from microscale.cast import cast
from microscale.errors import MicroscaleError
from microscale.formats import MXFP4
from microscale.spelling import get_block_format
from microscale.tensor import quantize
from oracle import MX, VARIETY, Options
from oracle_arrays import TORCH, assert_same, cast_tensor, to_numpy
from oracle_numbers import DTYPES as FLOAT_TYPES
from samples import DTYPES, awkward, sample

SHAPES = [(5,), (32,), (33,), (3, 40), (2, 3, 35), (4, 1, 7), (1,), (1, 1), (2, 2, 2, 17)]

by_variety = pytest.mark.parametrize("name", sorted(VARIETY))


# ---------------------------------------------------------------- axes, shapes, layouts, types


@by_variety
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_axis_of_every_shape(name: str, shape: tuple[int, ...]) -> None:
    x = sample(shape)
    for axis in range(-len(shape), len(shape)):
        assert_same(cast(x, name, axis), cast_tensor(x, VARIETY[name], axis, Options()), x)


@by_variety
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_input_type(name: str, dtype: torch.dtype) -> None:
    x = sample((3, 37), dtype, seed=1)
    values = cast(x, name, 1)
    assert values.dtype == dtype
    assert_same(values, cast_tensor(x, VARIETY[name], 1, Options()), x)


@pytest.mark.parametrize("name", ["mxfp4", "mxint8", "nvfp4", "int8-tensor", "e3m3-16-pow2-ceil"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", DTYPES, ids=str)
def test_every_output_type(name: str, dtype: torch.dtype, wanted: torch.dtype) -> None:
    x = sample((2, 37), dtype, seed=2)
    values = cast(x, name, dtype=wanted)
    assert values.dtype == wanted
    out = str(wanted).removeprefix("torch.")
    assert_same(values, cast_tensor(x, VARIETY[name], -1, Options(), out), x)


def strided() -> list[tuple[str, torch.Tensor]]:
    base = sample((3, 5, 36), seed=3)
    return [
        ("transposed", base.transpose(0, 2)),
        ("permuted", base.permute(1, 2, 0)),
        ("sliced", base[1:3, ::3, 2:35]),
        ("stepped", base[:, :, ::2]),
        ("expanded", sample((1, 35), seed=4).expand(5, 35)),
        ("expanded along the axis", sample((5, 1), seed=4).expand(5, 35)),
        ("broadcast scalar", torch.tensor(1.3).expand(4, 33)),
        ("unfolded", sample((50,), seed=5).unfold(0, 33, 3)),
        ("channels last", sample((1, 33, 3, 2), seed=6).to(memory_format=torch.channels_last)),
        ("offset", sample((100,), seed=7)[13:80]),
    ]


@pytest.mark.parametrize(("how", "x"), strided(), ids=[how for how, _ in strided()])
@pytest.mark.parametrize(
    "name", ["mxfp6_e3m2", "nvfp4", "int8-channel", "int8-token", "fp8_e4m3-tensor"]
)
def test_strides_change_no_bit(how: str, x: torch.Tensor, name: str) -> None:
    before = x.clone()
    for axis in range(x.dim()):
        values = cast(x, name, axis)
        assert values.is_contiguous(), how
        assert_same(values, to_numpy(cast(x.contiguous().clone(), name, axis)), x)
        assert_same(values, cast_tensor(x, VARIETY[name], axis, Options()), x)
    assert_same(x, to_numpy(before))


@by_variety
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 33), (2, 0, 5)], ids=str)
def test_empty_tensors(name: str, shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        for axis in range(len(shape)):
            values = cast(torch.empty(shape, dtype=dtype), name, axis)
            assert (values.shape, values.dtype) == (shape, dtype)


@by_variety
@pytest.mark.parametrize("axis", [0, -1])
def test_zero_dimensions_are_one_value(name: str, axis: int) -> None:
    x = torch.tensor(-1.37)
    values = cast(x, name, axis)
    assert values.shape == ()
    assert_same(values, cast_tensor(x, VARIETY[name], 0, Options()))


def test_the_default_axis_is_the_last() -> None:
    x = sample((4, 64))
    assert torch.equal(cast(x, "mxfp4"), cast(x, "mxfp4", 1))
    assert not torch.equal(cast(x, "mxfp4"), cast(x, "mxfp4", 0))


def test_a_format_is_taken_as_a_record_or_in_any_case() -> None:
    x = sample((2, 40))
    assert torch.equal(cast(x, MXFP4), cast(x, "MXFP4"))


def test_the_input_is_left_alone() -> None:
    x = sample((3, 40))
    before = x.clone()
    values = cast(x, "mxint8")
    values.zero_()
    assert torch.equal(x, before)
    fixed = cast(x, "mxint8")
    again = cast(fixed, "mxint8")
    assert again.data_ptr() != fixed.data_ptr()


@pytest.mark.parametrize("name", [*MX, "int5-3", "e4m0-1"])
def test_casting_twice_changes_nothing_more(name: str) -> None:
    once = cast(sample((4, 40), seed=9), name)
    assert_same(cast(once, name), to_numpy(once))


# ---------------------------------------------------------------- numpy


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_in_numpy_out(dtype: type[np.floating]) -> None:
    x = sample((3, 40)).numpy().astype(dtype)
    values = cast(x, "mxfp6_e2m3", 0)
    assert isinstance(values, np.ndarray)
    assert values.dtype == dtype
    assert_same(torch.from_numpy(values), to_numpy(cast(torch.from_numpy(x), "mxfp6_e2m3", 0)))


def test_numpy_views_of_every_kind() -> None:
    x = sample((6, 40)).numpy()
    frozen = x.copy()
    frozen.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for view in (x[::-1, ::-2], x.T, frozen, np.asfortranarray(x), x[:0]):
            expected = cast(torch.from_numpy(view.copy()), "mxfp4")
            assert_same(torch.from_numpy(cast(view, "mxfp4")), to_numpy(expected))


def test_numpy_out() -> None:
    x = sample((3, 40)).numpy()
    out = np.empty((3, 40), np.float64)
    assert cast(x, "mxfp4", out=out) is out
    assert_same(torch.from_numpy(out), to_numpy(cast(torch.from_numpy(x), "mxfp4")))


def test_numpy_has_no_bfloat16_to_give() -> None:
    with pytest.raises(MicroscaleError, match="bfloat16"):
        cast(np.ones((2, 32), np.float32), "mxfp4", dtype=torch.bfloat16)


def test_numpy_out_that_cannot_be_written() -> None:
    out = np.zeros((2, 32), np.float32)
    out.setflags(write=False)
    with pytest.raises(MicroscaleError, match="out"):
        cast(np.ones((2, 32), np.float32), "mxfp4", out=out)
    assert not out.any()


def test_numpy_out_that_runs_backwards() -> None:
    x = sample((2, 32)).numpy()
    out = np.zeros((2, 32), np.float32)[:, ::-1]
    try:
        cast(x, "mxfp4", out=out)
    except MicroscaleError as error:
        assert "out" in str(error)  # noqa: PT017
    else:
        assert_same(torch.from_numpy(out.copy()), to_numpy(cast(torch.from_numpy(x), "mxfp4")))


# ---------------------------------------------------------------- out and dtype


def test_out_receives_the_values() -> None:
    x = sample((3, 40))
    out = torch.full((3, 40), 7.0)
    assert cast(x, "mxfp4", out=out) is out
    assert torch.equal(out, cast(x, "mxfp4"))


def test_out_may_be_strided_or_the_input_itself() -> None:
    x = sample((3, 40))
    expected = cast(x, "mxfp4")
    out = torch.empty(40, 3).t()
    cast(x, "mxfp4", out=out)
    assert torch.equal(out, expected)
    cast(x, "mxfp4", out=x)
    assert torch.equal(x, expected)


def test_out_decides_the_type_and_rounds_once() -> None:
    x = sample((3, 40))
    out = torch.empty(3, 40, dtype=torch.float64)
    cast(x, "int8-tensor", out=out)
    assert_same(out, cast_tensor(x, VARIETY["int8-tensor"], -1, Options(), "float64"))


def test_out_takes_no_gradient() -> None:
    x = sample((3, 40)).requires_grad_()
    out = torch.empty(3, 40)
    cast(x, "mxfp4", out=out)
    assert not out.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float64_products_are_rounded_once(dtype: torch.dtype) -> None:
    # k x scale = 127 x s / 64 with a float32 scale s: 31 bits, one above a midpoint of `dtype`.
    precision = FLOAT_TYPES[str(dtype).removeprefix("torch.")].precision
    shift = 30 - precision
    middles = range(2**precision + 1, 2 ** (precision + 1), 2)
    middle = next(m for m in middles if (m * 2**shift + 1) % 127 == 0 and m % 4 == 1)
    scale = (middle * 2**shift + 1) // 127
    assert scale < 2**24
    x = torch.tensor([127 * scale * 2.0**-24], dtype=torch.float64)
    wanted = (middle + 1) * 2.0 ** (shift - 24)
    assert_same(cast(x, "int8-tensor", dtype=dtype), np.array([wanted]))


def test_float16_becomes_what_ieee_rounding_makes_of_it() -> None:
    x = torch.tensor([[65504.0, 60000.0, 1.0]], dtype=torch.float16)
    # Rounded up to 65536, which float16 has not.
    assert cast(x, "mxfp4-rceil")[0, 0] == math.inf
    assert cast(x, "mxfp4-rceil", dtype=torch.float32)[0, 0] == 65536.0
    tiny = torch.tensor([2.0**-24, 2.0**-24], dtype=torch.float16)
    assert_same(cast(tiny, "mxfp8_e4m3"), to_numpy(tiny))


# ---------------------------------------------------------------- the options


@by_variety
@pytest.mark.parametrize("rounding", ["even", "away", "zero"])
@pytest.mark.parametrize("nonfinite", ["block", "element"])
@pytest.mark.parametrize("flush", ["off", "element", "block"])
def test_every_option_with_awkward_values(
    name: str, rounding: str, nonfinite: str, flush: str
) -> None:
    x = awkward()
    element = VARIETY[name].element
    for overflow in ("saturate", "nonfinite") if element.has_nan else ("saturate",):
        options = Options(rounding, overflow, nonfinite, flush)
        for axis in (0, 1):
            values = cast(
                x,
                name,
                axis,
                rounding=rounding,
                overflow=overflow,
                nonfinite=nonfinite,
                flush_subnormals=flush,
            )
            assert_same(values, cast_tensor(x, VARIETY[name], axis, options), x)


@by_variety
def test_all_zero_blocks_keep_signs_where_the_element_has_them(name: str) -> None:
    x = torch.tensor([[0.0, -0.0] * 20, [0.0] * 40])
    values = to_numpy(cast(x, name))
    assert (values == 0).all()
    signed = VARIETY[name].element.has_negative_zero
    assert np.signbit(values).sum() == (20 if signed else 0)


@pytest.mark.parametrize("name", ["mxint8", "int8-tensor", "int4-channel", "int5-3", "int3-8-even"])
@pytest.mark.parametrize("rounding", ["even", "away", "zero"])
def test_integers_never_produce_the_most_negative_code(name: str, rounding: str) -> None:
    element = get_block_format(name).element
    x = -torch.linspace(1.0, 2.0, 4001)[:-1].repeat_interleave(2).reshape(-1, 2)
    stored = quantize(x, name, 1, rounding=rounding)
    bits = element.bits
    rows = stored.codes.reshape(-1, stored.codes.shape[-1]).tolist()
    seen = {code for row in rows for code in oracle.unpack(bytes(row), bits, 2)}
    assert 2 ** (bits - 1) not in seen
    assert 2 ** (bits - 1) + 1 in seen
    assert cast(torch.tensor([[-1.9999]]), "mxint8").item() == -127 / 64


def test_overflow_by_hand() -> None:
    x = torch.tensor([[480.0, -465.0, 464.0, 1.0]])
    assert cast(x, "mxfp8_e4m3").tolist() == [[448.0, -448.0, 448.0, 1.0]]
    ovf = cast(x, "mxfp8_e4m3", overflow="nonfinite")
    assert_same(ovf, np.array([[math.nan, math.nan, 448.0, 1.0]]))
    x = torch.tensor([[61440.0, -65535.0, 61439.0, 1.0]])
    assert cast(x, "mxfp8_e5m2").tolist() == [[57344.0, -57344.0, 57344.0, 1.0]]
    ovf = cast(x, "mxfp8_e5m2", overflow="nonfinite")
    assert ovf.tolist() == [[math.inf, -math.inf, 57344.0, 1.0]]


def test_nonfinite_by_hand() -> None:
    x = torch.tensor([[1.0, math.nan, 2.0], [1.0, math.inf, 2.0], [1.0, 3.0, 2.0]])
    whole = cast(x, "mxfp8_e5m2")
    assert whole[:2].isnan().all()
    assert whole[2].tolist() == [1.0, 3.0, 2.0]
    kept = cast(x, "mxfp8_e5m2", nonfinite="element")
    assert_same(kept, to_numpy(x))
    four = cast(x, "mxfp4", nonfinite="element")
    assert four[0].isnan().all()
    # The scale of (1, 2) is 1/2, so the largest value is 3.
    assert four[1].tolist() == [1.0, 3.0, 2.0]
    assert cast(x, "int8-tensor").isnan().all()


def test_flushing_by_hand() -> None:
    tiny = 2.0**-127
    x = torch.tensor([[tiny, -tiny, 2.0**-126], [tiny, -tiny, 2.0**-128]])
    assert_same(cast(x, "mxfp8_e5m2"), to_numpy(x))
    element = np.array([[0.0, -0.0, 2.0**-126], [0.0, -0.0, 0.0]])
    assert_same(cast(x, "mxfp8_e5m2", flush_subnormals="element"), element)
    block = np.array([[tiny, -tiny, 2.0**-126], [0.0, -0.0, 0.0]])
    assert_same(cast(x, "mxfp8_e5m2", flush_subnormals="block"), block)


@by_variety
@pytest.mark.parametrize("rounding", ["even", "away", "zero"])
def test_prerounding_with_awkward_values(name: str, rounding: str) -> None:
    x = awkward()
    for flush in ("off", "element", "block"):
        options = Options(rounding, flush=flush, prerounding="bfloat16")
        values = cast(x, name, rounding=rounding, flush_subnormals=flush, prerounding="bfloat16")
        assert_same(values, cast_tensor(x, VARIETY[name], -1, options), x)


def test_prerounding_by_hand() -> None:
    # The nearest bfloat16 of the first value is 1.25, which is a tie of e2m1.
    x = torch.tensor([[1.25 - 2.0**-9, 4.0], [3.4e38, 1.0]])
    assert cast(x, "mxfp4", rounding="away")[0].tolist() == [1.0, 4.0]
    rounded = cast(x, "mxfp4", rounding="away", prerounding="bfloat16")
    assert rounded[0].tolist() == [1.5, 4.0]
    assert rounded[1].isnan().all()  # 3.4e38 is beyond the largest bfloat16
    even = cast(x, "mxfp4", prerounding="bfloat16")
    assert even[0].tolist() == [1.0, 4.0]
    halves = sample((3, 70), torch.bfloat16)
    assert torch.equal(cast(halves, "mxfp4", prerounding="bfloat16"), cast(halves, "mxfp4"))


def test_a_scale_that_underflows_leaves_signed_zeros() -> None:
    x = torch.tensor([[2.0**-149, -(2.0**-149)]])
    assert_same(cast(x, "fp8_e4m3-tensor"), np.array([[0.0, -0.0]]))
    assert_same(cast(x, "nvfp4"), np.array([[0.0, -0.0]]))
    assert_same(cast(x, "int8-token", rounding="away"), np.array([[2.0**-149, -(2.0**-149)]]))


def test_nvfp4_leaves_poisoned_blocks_out_of_the_tensor_scale() -> None:
    x = sample((4, 16), seed=12)
    alone = cast(x, "nvfp4")
    poisoned = torch.cat([x, torch.full((1, 16), 1e30)])
    poisoned[4, 0] = math.inf
    values = cast(poisoned, "nvfp4")
    assert torch.equal(values[:4], alone)
    assert values[4].isnan().all()
    # With nonfinite="element" the finite values of that block count.
    kept = cast(poisoned, "nvfp4", nonfinite="element")
    assert kept.isfinite().all()
    assert not torch.equal(kept[:4], alone)


# ---------------------------------------------------------------- hypothesis


def numbers(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """Any float of the type, and small integers times powers of two."""
    width = {torch.float64: 64, torch.float16: 16}.get(dtype, 32)
    anything = st.floats(width=width)  # type: ignore[arg-type]
    grid = st.builds(math.ldexp, st.integers(-300, 300), st.integers(-10, 4))
    return st.one_of(anything, grid, grid)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 6), max_size=3)) if draw(st.booleans()) else [2, 37]
    values = draw(st.lists(numbers(dtype), min_size=1, max_size=12))
    repeat = math.ceil(math.prod(shape) / len(values)) + 1
    # A short list, repeated with a stride, fills shapes fast and shrinks well.
    flat = torch.tensor(values, dtype=torch.float64).to(dtype).repeat(repeat)
    return flat[: math.prod(shape)].reshape(shape)


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(x=tensors(), data=st.data())
def test_any_tensor_any_format_any_option(x: torch.Tensor, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(VARIETY)))
    fmt = VARIETY[name]
    axis = data.draw(st.integers(-max(x.dim(), 1), max(x.dim(), 1) - 1))
    overflow = ["saturate", "nonfinite"] if fmt.element.has_nan else ["saturate"]
    options = Options(
        data.draw(st.sampled_from(["even", "away", "zero"])),
        data.draw(st.sampled_from(overflow)),
        data.draw(st.sampled_from(["block", "element"])),
        data.draw(st.sampled_from(["off", "element", "block"])),
        data.draw(st.sampled_from(["off", "bfloat16"])),
    )
    out = data.draw(st.sampled_from([None, *TORCH]))
    values = cast(
        x,
        name,
        axis,
        rounding=options.rounding,
        overflow=options.overflow,
        nonfinite=options.nonfinite,
        flush_subnormals=options.flush,
        prerounding=options.prerounding,
        dtype=None if out is None else TORCH[out],
    )
    assert_same(values, cast_tensor(x, fmt, axis, options, out), x)


def test_batches_agree_with_single_rows() -> None:
    x = sample((5, 70), seed=14)
    rows = torch.stack([cast(row, "mxfp4") for row in x])
    assert torch.equal(cast(x, "mxfp4"), rows)


def test_the_mx_names_are_all_tested() -> None:
    assert set(MX) <= set(VARIETY)
