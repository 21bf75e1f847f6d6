"""Products with packed matrices by the compiled core, which decodes as it multiplies.

A matrix is packed along the dimension that is summed over, so both factors come as rows: `x` with
[M, K] values, `w` with [N, K], the result is x w^T, [M, N]. Decoded weights are those of
`dequantize` in float32, whatever type the result has; docs/numerics.md says how sums are made.
"""

import ctypes
import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from microscale.formats import BF16, E8M0, FP32, WHOLE_BLOCKS, BlockFormat, ScaleFormat
from microscale.kernels.native.loader import native
from microscale.kernels.native.records import TYPES
from microscale.kernels.storage import Layout, Stored, scale_dtype
from microscale.spelling import get_block_format

WIDTHS = (4, 6, 8)
"""Bits of the elements that the kernels unpack."""

# The range of elements in which neither they nor their products with bounded numbers leave float32.
_EXPONENTS = (-40, 40)

_E8M0, _TABLE, _BF16, _FP32 = range(4)  # ms_scale_kind


class PackedRecord(ctypes.Structure):
    """ms_packed."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "values", "scale_values")),
        *((name, ctypes.c_int64) for name in ("rows", "length", "row_bytes", "scale_stride")),
        *((name, ctypes.c_int32) for name in ("bits", "block", "scale_kind")),
        ("tensor_scale", ctypes.c_float),
    )


class DenseRecord(ctypes.Structure):
    """ms_dense."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("type", ctypes.c_int32),
    )


class Numbers(NamedTuple):
    """The numbers of a format: values by code as C arrays, and how scales are stored."""

    values: Any
    scale_values: Any
    scale_kind: int
    bits: int
    block: int


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    library = native().library
    if library is None:
        return None
    assert library.ms_product_sizes() == ctypes.sizeof(PackedRecord) * 10000 + ctypes.sizeof(
        DenseRecord
    )
    packed, dense = ctypes.POINTER(PackedRecord), ctypes.POINTER(DenseRecord)
    library.ms_linear.argtypes = [packed, dense, ctypes.c_void_p, dense, ctypes.c_int]
    library.ms_linear_packed.argtypes = [packed, packed, ctypes.c_void_p, dense, ctypes.c_int]
    return library


@lru_cache(maxsize=256)
def numbers(spelling: str) -> Numbers | str:
    """What the kernels know of a format, or why they do not multiply from it."""
    fmt = get_block_format(spelling)
    if fmt.element.bits not in WIDTHS:
        return f"elements of {fmt.element.bits} bits"
    if not (isinstance(fmt.block, int) or fmt.block in WHOLE_BLOCKS):
        return f"blocks of {fmt.block}"
    if fmt.tensor_scale not in (None, FP32):
        return f"a tensor scale in {fmt.tensor_scale}"
    if not _in_range(fmt):
        return f"elements beyond 2^{_EXPONENTS[1]}"
    kind = _scale_kind(fmt.scale)
    if kind is None:
        return f"scales in {fmt.scale}"
    grid = fmt.scale.grid
    scale_values = _floats(grid.values[:256]) if kind == _TABLE and grid is not None else None
    block = fmt.block if isinstance(fmt.block, int) else 0
    return Numbers(_floats(fmt.element.values), scale_values, kind, fmt.element.bits, block)


def _floats(values: tuple[float, ...]) -> Any:
    return (ctypes.c_float * 256)(*values)


def _in_range(fmt: BlockFormat) -> bool:
    sizes = [abs(v) for v in fmt.element.values if math.isfinite(v) and v]
    low, high = _EXPONENTS
    return math.ldexp(1.0, low) <= min(sizes) and max(sizes) <= math.ldexp(1.0, high)


def _scale_kind(scale: ScaleFormat) -> int | None:
    if scale == E8M0:
        return _E8M0
    if scale.bits == 8:
        return _TABLE if scale.grid is not None else None
    return {BF16: _BF16, FP32: _FP32}.get(scale)


def why_not(stored: Stored, layout: Layout, length: int) -> str:
    """Why the kernels do not multiply from these parts, or ""."""
    if _library() is None:
        return native().reason
    codes, scales, outer = stored
    if codes.device.type != "cpu":
        return f"parts on {codes.device}"
    if layout.compute is not torch.float32:
        return f"values in {layout.compute}"
    found = numbers(layout.format.name)
    if isinstance(found, str):
        return found
    fits = (
        codes.dim() == scales.dim() == 2
        and codes.dtype is torch.uint8
        and scales.dtype is scale_dtype(layout.format.scale)
        and scales.shape[0] in (1, codes.shape[0])
        and codes.shape[1] * 8 >= length * found.bits
        and scales.shape[1] >= (-(-length // found.block) if found.block else 1)
        and (layout.format.tensor_scale is None or outer.numel() == 1)
    )
    return "" if fits else "parts that are no matrix of its format"


def takes(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels read this x, a matrix on the CPU, and give a result of `dtype`."""
    return x.dtype in TYPES and gives(dtype) and x.device.type == "cpu" and x.dim() == 2


def gives(dtype: torch.dtype) -> bool:
    """Whether the kernels give a result of `dtype`."""
    return dtype in TYPES


def linear(
    x: Tensor,
    stored: Stored,
    fmt: str,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """X [M, K] in float32, bfloat16 or float16, times packed [N, K], plus bias [N]: [M, N].

    The parts are such that `why_not` has nothing against them. The result has `dtype`, by default
    that of x; it is rounded once from float32 (float16 of float32).
    """
    dtype = dtype or x.dtype
    if x.dtype is torch.float16:
        x = x.float()
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous()
    record, kept = _packed(stored, fmt, x.shape[1])
    return _run("ms_linear", (record, kept), (_dense(x), x), bias, (x.shape[0], dtype))


def linear_packed(
    parts: tuple[Stored, Stored], formats: tuple[str, str], length: int, dtype: torch.dtype
) -> Tensor:
    """Packed x [M, K] times packed w [N, K]: [M, N] in `dtype`."""
    x, w = (_packed(p, fmt, length) for p, fmt in zip(parts, formats, strict=True))
    return _run("ms_linear_packed", w, x, None, (parts[0][0].shape[0], dtype))


def _run(
    name: str,
    w: tuple[PackedRecord, object],
    x: tuple[ctypes.Structure, object],
    bias: Tensor | None,
    result: tuple[int, torch.dtype],
) -> Tensor:
    library = _library()
    assert library is not None
    rows, dtype = result
    kernel_dtype = torch.float32 if dtype is torch.float16 else dtype
    out = torch.empty((rows, w[0].rows), dtype=kernel_dtype)
    if bias is not None:
        bias = bias.float().contiguous()
    pointer = None if bias is None else bias.data_ptr()
    status = getattr(library, name)(w[0], x[0], pointer, _dense(out), torch.get_num_threads())
    if status:
        raise MemoryError
    return out if dtype is kernel_dtype else out.to(dtype)


def _dense(x: Tensor) -> DenseRecord:
    return DenseRecord(x.data_ptr(), x.shape[0], x.stride(0), TYPES[x.dtype])


def _packed(stored: Stored, fmt: str, length: int) -> tuple[PackedRecord, object]:
    """The record of packed parts, and what must live as long as it does."""
    found = numbers(fmt)
    assert isinstance(found, Numbers)
    codes, scales, outer = stored
    if codes.stride(1) != 1 and codes.shape[1] > 1:
        codes = codes.contiguous()
    if scales.stride(1) != 1 and scales.shape[1] > 1:
        scales = scales.contiguous()
    record = PackedRecord(
        codes.data_ptr(),
        scales.data_ptr(),
        ctypes.addressof(found.values),
        None if found.scale_values is None else ctypes.addressof(found.scale_values),
        codes.shape[0],
        length,
        codes.stride(0),
        scales.stride(0) if scales.shape[0] > 1 else 0,
        found.bits,
        found.block,
        found.scale_kind,
        outer.item() if outer.numel() else 1.0,
    )
    return record, (codes, scales)
