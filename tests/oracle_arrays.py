"""The oracle for whole arrays: searches in the exact grids of `oracle`, in numpy float64.

Every quotient by a power of two, every grid value and every midpoint between two of them is a
float64, so these searches are exact for float16, bfloat16 and float32 inputs and for float64 inputs
whose quotients stay normal. Float32 arithmetic of real-valued scales is numpy's own. It shares
nothing with the kernels; `test_oracle.py` holds it against the rational oracle.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

import oracle
from oracle import Format, Options
from oracle_numbers import DTYPES, Element

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]
Working = npt.NDArray[Any]  # float32 or float64, as the contract computes

NAN_EXPONENT = -(2**15)
TORCH = {name: getattr(torch, name) for name in DTYPES}


@dataclass(frozen=True)
class Grid:
    """Magnitudes of an element in rising order with the value beyond the largest at their end."""

    magnitudes: Floats
    middles: Floats
    element: Element

    def place(self, magnitude: Floats, rounding: str) -> Integers:
        """The index of the rounded magnitude; the last index means beyond the largest."""
        last = len(self.magnitudes) - 1
        if rounding == "zero":
            return np.searchsorted(self.magnitudes, magnitude, side="right").astype(np.int64) - 1
        side: Literal["left", "right"] = "right" if rounding == "away" else "left"
        place: Integers = np.searchsorted(self.middles, magnitude, side=side).astype(np.int64)
        if rounding == "even":
            tie = (place < last) & (self.middles[np.minimum(place, last - 1)] == magnitude)
            odd = place % 2 == 1
            if self.element.mantissa_bits == 0 and not self.element.integer:
                odd = place > 0  # no nonzero significand is even (see tie_goes_up)
            place = np.where(tie & odd, place + 1, place)
        return place

    def encode(self, quotient: Floats, options: Options) -> Floats:
        """Signed element values of signed quotients; an infinite quotient overflows."""
        place = self.place(np.abs(quotient), options.rounding)
        last = len(self.magnitudes) - 1
        value = self.magnitudes[np.minimum(place, last - 1)]
        if self.element.specials == "full":
            value = np.where(np.signbit(quotient), self.magnitudes[place], value)
        if options.overflow == "nonfinite":
            special = np.inf if self.element.has_inf else np.nan
            value = np.where(place == last, special, value)
        value = np.copysign(value, quotient)
        return value if self.element.has_negative_zero else value + 0.0


@cache
def grid(element: Element) -> Grid:
    """The grid of an element as float64 arrays (every one of its numbers is exact there)."""
    exact = [*element.magnitudes, element.beyond]
    middles = [(low + high) / 2 for low, high in pairwise(exact)]
    return Grid(np.array(exact, np.float64), np.array(middles, np.float64), element)


@dataclass(frozen=True)
class Cast:
    """Decoded values before the rounding to the output type, and one scale for each row."""

    values: Floats
    scales: Floats


def finite_amax(x: Floats) -> Floats:
    """The largest finite magnitude of each row; 0 for rows that have none."""
    amax: Floats = np.max(np.abs(np.where(np.isfinite(x), x, 0.0)), axis=1, initial=0.0)
    return amax


def exponents(amax: Floats, fmt: Format) -> Integers:
    """Clamped exponents of power-of-two scales; that of code 0 for rows of zeros."""
    assert fmt.scale.exponents is not None
    low, high = fmt.scale.exponents
    mantissa, exponent = np.frexp(amax)  # mantissa in [0.5, 1)
    exponent = exponent.astype(np.int64) - 1
    element = fmt.element
    if fmt.rule == "ceil":
        exponent = exponent + (mantissa > 0.5)
    if fmt.rule == "even":
        exponent = exponent + (mantissa >= 1.0 - 2.0 ** -(element.width + 2))
    if fmt.rule == "seven_quarters":
        exponent = exponent + (mantissa >= 0.875)
    if fmt.rule == "rceil":
        exponent = exponent + (mantissa > np.frexp(float(element.largest))[0])
    return np.where(amax == 0, fmt.scale.code_zero, np.clip(exponent - element.emax, low, high))


def flushed(x: Floats, mode: str) -> Floats:
    """Float32 subnormals as zeros of their sign, each or by whole rows."""
    tiny = np.abs(x) < 2.0**-126
    if mode == "off":
        return x
    if mode == "block":
        tiny = tiny & (finite_amax(x) < 2.0**-126)[:, None]
    return np.where(tiny, np.copysign(0.0, x), x)


def poisoned(x: Floats, element: Element, options: Options) -> Bools:
    """Rows whose scale becomes NaN."""
    has_nan = np.isnan(x).any(axis=1)
    bad = has_nan & (not element.has_nan)
    if options.nonfinite == "block":
        bad = has_nan | np.isinf(x).any(axis=1)
    return np.asarray(bad, np.bool_)


def _elements(x: Floats, quotient: Floats, element: Element, options: Options) -> Floats:
    value = grid(element).encode(np.where(np.isnan(x), 0.0, quotient), options)
    if element.has_inf:
        value = np.where(np.isinf(x), x, value)
    return np.where(np.isnan(x), np.nan, value)


def cast_rows(x: Floats, fmt: Format, options: Options) -> Cast:
    """Cast each row of a matrix as one block with a power-of-two scale."""
    x = flushed(x, options.flush)
    exponent = exponents(finite_amax(x), fmt)
    coded = _elements(x, np.ldexp(x, -exponent[:, None]), fmt.element, options)
    bad = poisoned(x, fmt.element, options)
    with np.errstate(over="ignore"):
        values = np.where(bad[:, None], np.nan, np.ldexp(coded, exponent[:, None]))
    return Cast(values, np.where(bad, NAN_EXPONENT, exponent).astype(np.float64))


def cast_rows_real(x: Floats, fmt: Format, options: Options, *, compute: str) -> Cast:
    """Cast each row of a matrix as one block with a real-valued scale of its own."""
    kind: Any = np.float64 if compute == "float64" else np.float32
    x = flushed(x, options.flush)
    bad = poisoned(x, fmt.element, options)
    amax = finite_amax(x)
    scale = round_to_scale(amax / float(fmt.element.largest), fmt)
    scale = np.where(amax == 0, 1.0, scale)
    bad = bad | ((scale == 0) & np.isinf(x).any(axis=1))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        quotient = (x.astype(kind) / scale.astype(kind)[:, None]).astype(np.float64)
    zeroed = (scale[:, None] == 0) & np.isfinite(x)  # a scale that underflowed to 0
    quotient = np.where(zeroed, np.copysign(0.0, x), quotient)
    coded = _elements(x, quotient, fmt.element, options)
    with np.errstate(over="ignore", invalid="ignore"):
        product = (coded.astype(kind) * scale.astype(kind)[:, None]).astype(np.float64)
    values = np.where(np.isfinite(coded), product, coded)
    return Cast(np.where(bad[:, None], np.nan, values), np.where(bad, np.nan, scale))


def cast_two_level(x: Floats, fmt: Format, options: Options, *, compute: str) -> Cast:
    """Cast the rows of a matrix as blocks under one float32 tensor scale (NVFP4)."""
    kind: Any = np.float64 if compute == "float64" else np.float32
    x = flushed(x, options.flush)
    bad = poisoned(x, fmt.element, options)
    amax: Working = np.where(bad, 0.0, finite_amax(x)).astype(kind)
    assert fmt.scale.binary is not None
    largest = float(fmt.element.largest)
    whole = float(amax.max(initial=0)) / (float(fmt.scale.binary.largest) * largest)
    outer = kind(min(float(round_output(np.array(whole), "float32")), float(np.finfo("f4").max)))
    outer = outer if amax.any() else kind(1)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scale = (amax / kind(largest) / outer).astype(np.float64)
        scale = round_to_scale(np.where(outer == 0, 0.0, scale), fmt)
        scale = np.where(amax == 0, 1.0, scale).astype(kind)
        bad = bad | ((scale == 0) & np.isinf(x).any(axis=1))
        product = (scale * outer)[:, None]
        quotient = (x.astype(kind) / product).astype(np.float64)
        zeroed = (product == 0) & np.isfinite(x)
        quotient = np.where(zeroed, np.copysign(0.0, x), quotient)
        coded = _elements(x, quotient, fmt.element, options)
        decoded = (coded.astype(kind) * scale[:, None] * outer).astype(np.float64)
    values = np.where(bad[:, None], np.nan, np.where(np.isfinite(coded), decoded, coded))
    return Cast(values, np.where(bad, np.nan, scale.astype(np.float64)))


def round_to_scale(value: Floats, fmt: Format) -> Floats:
    """Positive values rounded to a real-valued scale format, saturating."""
    binary = fmt.scale.binary
    assert binary is not None
    largest = float(binary.largest)
    return np.minimum(round_bits(value, binary.precision, binary.emin), largest)


def round_bits(value: Floats, precision: int, emin: int) -> Floats:
    """Nearest even at a precision, with subnormals below 2**emin and no upper end."""
    finite = np.where(np.isfinite(value), value, 0.0)
    exponent = np.maximum(np.frexp(finite)[1] - 1, emin) - precision + 1
    rounded = np.ldexp(np.rint(np.ldexp(finite, -exponent)), exponent)
    return np.where(np.isfinite(value), np.copysign(rounded, value), value)


def round_output(value: Floats, dtype: str) -> Floats:
    """One IEEE rounding of float64 values to a float type, kept as float64."""
    if dtype == "float64":
        return value
    binary = DTYPES[dtype]
    rounded = round_bits(value, binary.precision, binary.emin)
    over = np.abs(rounded) > float(binary.largest)
    return np.where(over, np.copysign(np.inf, rounded), rounded)


def split_blocks(
    shape: tuple[int, ...], axis: int, block: int | str | tuple[int, int]
) -> list[Integers]:
    """The flat indices of the values of each block of a tensor, in order along the axis."""
    places = np.arange(math.prod(shape), dtype=np.int64).reshape(shape or (1,))
    axis %= places.ndim
    if places.size == 0:
        return []
    if block == "tensor":
        return [places.reshape(-1)]
    if block == "channel":
        kept = places.ndim - 1 if axis == 0 else 0
        channels = np.moveaxis(places, kept, 0) if places.ndim > 1 else places[None]
        return list(channels.reshape(len(channels), -1))
    if isinstance(block, tuple):
        return _split_tiles(places, axis, block)
    rows = np.moveaxis(places, axis, -1).reshape(-1, places.shape[axis])
    size = block if isinstance(block, int) else places.shape[axis]
    return [row[start : start + size] for row in rows for start in range(0, len(row), size)]


def _split_tiles(places: Integers, axis: int, tile: tuple[int, int]) -> list[Integers]:
    """Tiles of the matrices that the last two dimensions are, or those in front of them."""
    height, width = tile
    if places.ndim == 1:
        matrices = places[None, None]
    elif axis >= places.ndim - 2:
        other = places.ndim - 1 if axis == places.ndim - 2 else places.ndim - 2
        matrices = np.moveaxis(places, (other, axis), (-2, -1))
    else:
        matrices = np.moveaxis(places, (axis - 1 if axis else 1, axis), (-2, -1))
    rows, columns = matrices.shape[-2:]
    return [
        matrix[top : top + height, left : left + width].reshape(-1)
        for matrix in matrices.reshape(-1, rows, columns)
        for top in range(0, rows, height)
        for left in range(0, columns, width)
    ]


def cast_tensor(
    x: torch.Tensor, fmt: Format, axis: int, options: Options, out: str | None = None
) -> Floats:
    """Cast a small tensor by the exact oracle, in its own type or in `out`."""
    own = str(x.dtype).removeprefix("torch.")
    flat = to_numpy(x).reshape(-1)
    places = split_blocks(tuple(x.shape), axis, fmt.block)
    compute = "float64" if own == "float64" else "float32"
    blocks = [flat[place].tolist() for place in places]
    result = np.zeros_like(flat)
    done = oracle.cast_blocks(blocks, fmt, options, compute=compute, out=out or own)
    for place, block in zip(places, done, strict=True):
        result[place] = block.values
    return result.reshape(tuple(x.shape))


def to_numpy(tensor: torch.Tensor) -> Floats:
    """Any float tensor as float64; exact."""
    return np.asarray(tensor.detach().to(torch.float64).contiguous().numpy(), np.float64)


def all_halves(dtype: str) -> torch.Tensor:
    """Every value of bfloat16 or float16, in the order of their 2**16 codes."""
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    halves: torch.Tensor = codes.view(TORCH[dtype])
    return halves


def bits(values: Floats) -> Integers:
    """Bit patterns with one pattern for all NaNs, so that equality tells -0.0 from 0.0."""
    return np.where(np.isnan(values), np.nan, values).view(np.int64)


def assert_same(actual: torch.Tensor, expected: Floats, given: object = None) -> None:
    """Assert equality bit for bit (NaN equals NaN, -0.0 is not 0.0); show the first differences."""
    got = to_numpy(actual)
    assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"
    wrong = bits(got) != bits(np.ascontiguousarray(expected, np.float64))
    if not wrong.any():
        return
    places = np.argwhere(wrong)[:5]
    lines = []
    for place in map(tuple, places):
        source = ""
        if isinstance(given, torch.Tensor):
            source = f" from {float(to_numpy(given)[place]).hex()}"
        lines.append(f"{place}: {float(got[place]).hex()}, not {float(expected[place]).hex()}")
        lines[-1] += source
    raise AssertionError(f"{int(wrong.sum())} of {wrong.size} differ; first: " + "; ".join(lines))
