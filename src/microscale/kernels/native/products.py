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

from microscale.formats import BF16, E8M0, FP32, BlockFormat, ScaleFormat
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
    assert library.ms_product_sizes() == ctypes.sizeof(PackedRecord)
    packed, pointer, size = ctypes.POINTER(PackedRecord), ctypes.c_void_p, ctypes.c_int64
    number = ctypes.c_int
    library.ms_linear.argtypes = [packed, pointer, size, size, pointer, pointer, number, number]
    library.ms_linear_packed.argtypes = [packed, packed, pointer, pointer, number, number]
    return library


@lru_cache(maxsize=256)
def numbers(spelling: str) -> Numbers | str:
    """What the kernels know of a format, or why they do not multiply from it."""
    fmt = get_block_format(spelling)
    if foreign := _foreign(fmt):
        return foreign
    kind = _scale_kind(fmt.scale)
    if kind is None:
        return f"scales in {fmt.scale}"
    grid = fmt.scale.grid
    scale_values = _floats(grid.values[:256]) if kind == _TABLE and grid is not None else None
    block = fmt.block if isinstance(fmt.block, int) else 0
    return Numbers(_floats(fmt.element.values), scale_values, kind, fmt.element.bits, block)


def _foreign(fmt: BlockFormat) -> str:
    """What the kernels do not know of a format, besides its scale, or ""."""
    reasons = {
        f"elements of {fmt.element.bits} bits": fmt.element.bits not in WIDTHS,
        f"tiles of {fmt.block}": isinstance(fmt.block, tuple),
        "zero points": fmt.zero_point,
        f"a tensor scale in {fmt.tensor_scale}": fmt.tensor_scale not in (None, FP32),
        f"elements beyond 2^{_EXPONENTS[1]}": not _in_range(fmt),
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


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
    codes, scales, outer, _ = stored
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
    """Whether the kernels read this x, on the CPU, and give a result of `dtype`."""
    return x.dtype in TYPES and gives(dtype) and x.device.type == "cpu"


def gives(dtype: torch.dtype) -> bool:
    """Whether the kernels give a result of `dtype`."""
    return dtype in TYPES


class Matrix:
    """A packed matrix [N, K] that the kernels multiply from, and its record.

    `dtype` is that of the tensor it belongs to, which the kernels do not ask for.
    """

    __slots__ = ("_pointers", "_version", "columns", "dtype", "parts", "record", "rows")

    def __init__(
        self, stored: Stored, fmt: str, length: int, dtype: torch.dtype = torch.float32
    ) -> None:
        """Take parts that `why_not` has nothing against."""
        found = numbers(fmt)
        assert isinstance(found, Numbers)
        codes, scales, outer, _ = stored
        self._pointers, self._version = _pointers(stored), outer._version
        if codes.stride(1) != 1 and codes.shape[1] > 1:
            codes = codes.contiguous()
        if scales.stride(1) != 1 and scales.shape[1] > 1:
            scales = scales.contiguous()
        self.parts, self.rows, self.columns = (codes, scales), codes.shape[0], length
        self.dtype = dtype
        self.record = PackedRecord(
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

    def holds(self, stored: Stored) -> bool:
        """Whether this is still the record of those parts; their contents do not matter."""
        copied = self.parts[0].data_ptr() != self._pointers[0]
        same = self._pointers == _pointers(stored) and self._version == stored[2]._version
        return same and not copied


def _pointers(stored: Stored) -> tuple[int, int, int]:
    return stored[0].data_ptr(), stored[1].data_ptr(), stored[2].data_ptr()


def linear(
    x: Tensor, w: Matrix, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The product of x [..., K], in float32, bfloat16 or float16, and packed [N, K], plus bias [N].

    Returns [..., N] in `dtype`, by default that of x, rounded once from float32.
    """
    dtype = dtype or x.dtype
    if x.dtype is torch.float16:
        x = x.float()
    if not x.is_contiguous() and not (x.dim() == 2 and x.stride(1) == 1):
        x = x.contiguous()
    stride = x.stride(-2) if x.dim() > 1 else 0
    shape = (x.shape[0], w.rows) if x.dim() == 2 else (*x.shape[:-1], w.rows)
    out = torch.empty(shape, dtype=_result(dtype))
    if bias is not None and (bias.dtype is not torch.float32 or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    library = _library()
    assert library is not None
    status = library.ms_linear(
        w.record,
        x.data_ptr(),
        x.numel() // w.columns if w.columns else out.numel() // max(w.rows, 1),
        stride,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        TYPES[x.dtype] + 16 * TYPES[out.dtype],
        torch.get_num_threads(),
    )
    if status:
        raise MemoryError
    return out if out.dtype is dtype else out.to(dtype)


def linear_packed(x: Matrix, w: Matrix, dtype: torch.dtype) -> Tensor:
    """Packed x [M, K] times packed w [N, K]: [M, N] in `dtype`."""
    out = torch.empty((x.rows, w.rows), dtype=_result(dtype))
    library = _library()
    assert library is not None
    status = library.ms_linear_packed(
        w.record, x.record, None, out.data_ptr(), TYPES[out.dtype], torch.get_num_threads()
    )
    if status:
        raise MemoryError
    return out if out.dtype is dtype else out.to(dtype)


def _result(dtype: torch.dtype) -> torch.dtype:
    """The type that kernels write where `dtype` is wanted."""
    return torch.float32 if dtype is torch.float16 else dtype
