"""The op table: schema, fake kernel, gradient and kernels of each operator, in one place.

Kernels know nothing of torch.library; this file alone registers them. A format and its options
cross the boundary as their spelling. The reference kernels serve every device that PyTorch does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from microscale.kernels import reference
from microscale.kernels.plan import plan
from microscale.kernels.storage import Layout, Stored, decoded_shape, empty_storage
from microscale.rounding import read_options
from microscale.spelling import get_block_format

_library = torch.library.Library("microscale", "DEF")


def _define(schema: str, kernel: Callable[..., object], fake: Callable[..., object]) -> None:
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"microscale::{name}", fake, lib=_library)


def _cast(
    x: Tensor, fmt: str, axis: int, options: str, dtype: torch.dtype, seed: Tensor | None = None
) -> Tensor:
    return reference.cast(x, plan(x, fmt, axis, read_options(options)), dtype, seed)


def _cast_fake(
    x: Tensor, fmt: str, axis: int, options: str, dtype: torch.dtype, seed: Tensor | None = None
) -> Tensor:
    plan(x, fmt, axis, read_options(options))
    return x.new_empty(x.shape, dtype=dtype)


def _in_range(x: Tensor, fmt: str, axis: int, options: str) -> Tensor:
    return reference.in_range(x, plan(x, fmt, axis, read_options(options)))


def _in_range_fake(x: Tensor, fmt: str, axis: int, options: str) -> Tensor:
    return _cast_fake(x, fmt, axis, options, torch.bool, None)


def _quantize(x: Tensor, fmt: str, axis: int, options: str, seed: Tensor | None = None) -> Stored:
    return reference.quantize(x, plan(x, fmt, axis, read_options(options)), seed)


def _quantize_fake(
    x: Tensor, fmt: str, axis: int, options: str, seed: Tensor | None = None
) -> Stored:
    return empty_storage(x, plan(x, fmt, axis, read_options(options)))


def _dequantize(
    stored: list[Tensor], fmt: str, axis: int, compute: torch.dtype, length: int, dtype: torch.dtype
) -> Tensor:
    codes, scales, outer, zero = stored
    layout = Layout(get_block_format(fmt), axis, compute)
    return reference.dequantize((codes, scales, outer, zero), layout, length, dtype)


def _dequantize_fake(
    stored: list[Tensor], fmt: str, axis: int, compute: torch.dtype, length: int, dtype: torch.dtype
) -> Tensor:
    return stored[0].new_empty(decoded_shape(stored[0], axis, length), dtype=dtype)


_CAST = "Tensor x, str format, int axis, str options"
_define(f"cast({_CAST}, ScalarType dtype, Tensor? seed=None) -> Tensor", _cast, _cast_fake)
_define(f"in_range({_CAST}) -> Tensor", _in_range, _in_range_fake)
_define(
    f"quantize({_CAST}, Tensor? seed=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _quantize,
    _quantize_fake,
)
_define(
    "dequantize(Tensor[] stored, str format, int axis, ScalarType compute, SymInt length, "
    "ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_fake,
)


def _remember_dtype(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad.to(ctx.dtype), None, None, None, None, None


torch.library.register_autograd(
    "microscale::cast", _straight_through, setup_context=_remember_dtype, lib=_library
)
