"""The records of csrc/format.h and csrc/cast.h, filled from the formats."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch

from microscale.formats import (
    BF16,
    E8M0,
    FP32,
    SCALE_E4M3,
    UE5M3,
    WHOLE_BLOCKS,
    BlockFormat,
    ElementFormat,
)
from microscale.rounding import FlushSubnormals, Nonfinite, Options, Overflow, Rounding, ScaleRule

DIMENSIONS = 8
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The types that the kernels read and write, by their number in format.h."""

# In the order of the enumerations of format.h.
_ROUNDINGS = (Rounding.EVEN, Rounding.AWAY, Rounding.ZERO, Rounding.STOCHASTIC)
_RULES = (
    ScaleRule.FLOOR,
    ScaleRule.CEIL,
    ScaleRule.EVEN,
    ScaleRule.RCEIL,
    ScaleRule.MSE,
    ScaleRule.AMAX,
    ScaleRule.FOUR_OVER_SIX,
)
_FLUSHES = (FlushSubnormals.OFF, FlushSubnormals.ELEMENT, FlushSubnormals.BLOCK)
_SEARCHED = (ScaleRule.MSE, ScaleRule.FOUR_OVER_SIX)


class Element(ctypes.Structure):
    """ms_element."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in (
            "bits", "mantissa_bits", "emin", "emax", "is_integer", "has_negative_zero",
            "largest_code", "inf_code", "nan_code", "unused",
        )),
        ("largest", ctypes.c_double),
    )  # fmt: skip


class Format(ctypes.Structure):
    """ms_format."""

    _fields_ = (
        *((name, Element) for name in ("element", "grid", "tensor_grid")),
        *((name, ctypes.c_int32) for name in (
            "power_of_two", "scale_bits", "scale_low", "scale_high", "rule", "has_tensor_scale",
        )),
        ("scale_largest", ctypes.c_double),
        ("block", ctypes.c_int64),
    )  # fmt: skip


class PlanRecord(ctypes.Structure):
    """ms_plan."""

    _fields_ = (
        ("format", Format),
        *((name, ctypes.c_int32) for name in ("rounding", "overflow", "nonfinite", "flush")),
    )


class Geometry(ctypes.Structure):
    """ms_geometry."""

    _fields_ = (
        ("dimensions", ctypes.c_int64),
        *((name, ctypes.c_int64 * DIMENSIONS) for name in ("shape", "x", "y", "index", "scale")),
        *((name, ctypes.c_int64) for name in (
            "length", "x_axis", "y_axis", "index_axis", "scale_axis",
        )),
    )  # fmt: skip

    def set_lanes(self, shape: Sequence[int], **strides: Sequence[int]) -> None:
        """Fill in every dimension but the axis, with its strides by name."""
        self.dimensions = len(shape)
        self.shape[: len(shape)] = shape
        for name, values in strides.items():
            getattr(self, name)[: len(shape)] = values


class Job(ctypes.Structure):
    """ms_job."""

    _fields_ = (
        ("plan", ctypes.POINTER(PlanRecord)),
        ("geometry", Geometry),
        *((name, ctypes.c_void_p) for name in ("x", "y", "scales", "seed", "tensor_scale")),
        *((name, ctypes.c_int32) for name in ("x_type", "y_type", "threads", "given")),
    )


SIZES = ctypes.sizeof(PlanRecord) * 10000 + ctypes.sizeof(Job)
"""What ms_sizes() of a fitting library gives."""


def element_record(element: ElementFormat | None) -> Element:
    """The numbers of an element, or of none."""
    if element is None:
        return Element()
    none = -1
    return Element(
        bits=element.bits,
        mantissa_bits=element.mantissa_bits,
        emin=element.emin,
        emax=element.emax,
        is_integer=element.is_integer,
        has_negative_zero=element.has_negative_zero,
        largest_code=element.largest_code,
        inf_code=none if element.inf_code is None else element.inf_code,
        nan_code=none if element.nan_code is None else element.nan_code,
        largest=element.largest,
    )


def format_record(fmt: BlockFormat) -> Format:
    """The numbers of a block format that the kernels serve."""
    low, high = fmt.scale.exponents or (0, 0)
    return Format(
        element=element_record(fmt.element),
        grid=element_record(fmt.scale.grid),
        tensor_grid=element_record(fmt.tensor_scale.grid if fmt.tensor_scale else None),
        power_of_two=fmt.scale.is_power_of_two,
        scale_bits=fmt.scale.bits,
        scale_low=low,
        scale_high=high,
        rule=_RULES.index(fmt.rule),
        has_tensor_scale=fmt.tensor_scale is not None,
        scale_largest=fmt.scale.largest,
        block=fmt.block if isinstance(fmt.block, int) else 0,
    )


@lru_cache(maxsize=1024)
def plan_record(fmt: BlockFormat, options: Options) -> PlanRecord:
    """The numbers of a cast that the kernels serve."""
    return PlanRecord(
        format=format_record(fmt),
        rounding=_ROUNDINGS.index(options.rounding),
        overflow=options.overflow is Overflow.NONFINITE,
        nonfinite=options.nonfinite is Nonfinite.ELEMENT,
        flush=_FLUSHES.index(options.flush_subnormals),
    )


def serves(fmt: BlockFormat, options: Options) -> bool:
    """Whether the compiled kernels compute this cast; all others run on the reference.

    Left to the reference: prerounding, scales that are none of the five usual ones, tiles, zero
    points, integers that use their most negative code, the rule `seven_quarters`, elements with
    exponents beyond 100, and searched scales of blocks as long as the data.
    """
    element, scale = fmt.element, fmt.scale
    if fmt.zero_point or scale not in (E8M0, SCALE_E4M3, UE5M3, BF16, FP32):
        return False
    # Built again from the parts that are known here: a part that is not known cannot slip through.
    known = (
        element
        == ElementFormat(
            element.exponent_bits, element.mantissa_bits, element.specials, element.bias
        )
        and fmt == BlockFormat(element, scale, fmt.block, fmt.rule, fmt.tensor_scale)
        and options
        == Options(options.rounding, options.overflow, options.nonfinite, options.flush_subnormals)
    )
    return (
        known
        and element.specials != "full"
        and fmt.tensor_scale in (None, FP32)
        and (isinstance(fmt.block, int) or fmt.block in WHOLE_BLOCKS)
        and fmt.rule in _RULES
        and not (fmt.rule in _SEARCHED and isinstance(fmt.block, str))
        and options.rounding in _ROUNDINGS
        and options.flush_subnormals in _FLUSHES
        and -100 <= element.emin <= element.emax <= 100
    )
