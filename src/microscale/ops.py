"""The op table: schema, fake kernel, gradient and kernels of each operator, in one place.

Kernels know nothing of torch.library; this file alone registers them. A format and its options
cross the boundary as their spelling. The reference kernels serve every device that PyTorch does; on
the CPU the compiled core serves what it can, and the reference the rest.
"""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from microscale.kernels import reference, rotation
from microscale.kernels.native import casts as native
from microscale.kernels.native import products
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


def _parts(stored: list[Tensor]) -> Stored:
    codes, scales, tensor_scale, zero_point = stored
    return codes, scales, tensor_scale, zero_point


def _dequantize(
    stored: list[Tensor], fmt: str, axis: int, compute: torch.dtype, length: int, dtype: torch.dtype
) -> Tensor:
    layout = Layout(get_block_format(fmt), axis, compute)
    return reference.dequantize(_parts(stored), layout, length, dtype)


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


# ---------------------------------------------------------------- the compiled core, on the CPU


def _cast_cpu(
    x: Tensor, fmt: str, axis: int, options: str, dtype: torch.dtype, seed: Tensor | None = None
) -> Tensor:
    found = native.served(fmt, *options.split())
    if found is None or not native.takes(x, dtype):
        return _cast(x, fmt, axis, options, dtype, seed)
    checked = plan(x, fmt, axis, read_options(options))
    return native.cast(x, found, checked.axis, dtype, seed)


def _quantize_cpu(
    x: Tensor, fmt: str, axis: int, options: str, seed: Tensor | None = None
) -> Stored:
    found = native.served(fmt, *options.split())
    if found is None or not native.packs(x):
        return _quantize(x, fmt, axis, options, seed)
    return native.quantize(x, found, plan(x, fmt, axis, read_options(options)).axis, seed)


def _dequantize_cpu(
    stored: list[Tensor], fmt: str, axis: int, compute: torch.dtype, length: int, dtype: torch.dtype
) -> Tensor:
    found = native.served(fmt, *native.DECODING)
    parts = _parts(stored)
    if found is None or not native.decodes(parts, found, length, compute):
        return _dequantize(stored, fmt, axis, compute, length, dtype)
    return native.dequantize(parts, found, Layout(found.format, axis, compute), length, dtype)


for _name, _kernel in (
    ("cast", _cast_cpu), ("quantize", _quantize_cpu), ("dequantize", _dequantize_cpu)
):  # fmt: skip
    _library.impl(_name, _kernel, "CPU")


# ---------------------------------------------------------------- products


def _packed_linear(
    x: Tensor,
    weight: list[Tensor],
    fmt: str,
    compute: torch.dtype,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """X [M, K] times the transpose of packed [N, K], plus bias [N]."""
    wide = torch.promote_types(compute, x.dtype)
    values = _dequantize(weight, fmt, 1, compute, x.shape[1], wide)
    added = None if bias is None else bias.to(wide)
    return torch.nn.functional.linear(x.to(wide), values, added).to(dtype)


def _packed_linear_cpu(
    x: Tensor,
    weight: list[Tensor],
    fmt: str,
    compute: torch.dtype,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    stored, layout = _parts(weight), Layout(get_block_format(fmt), 1, compute)
    if products.takes(x, dtype) and not products.why_not(stored, layout, x.shape[1]):
        return products.linear(x, products.Matrix(stored, fmt, x.shape[1]), bias, dtype)
    return _packed_linear(x, weight, fmt, compute, bias, dtype)


def _packed_linear_fake(
    x: Tensor,
    weight: list[Tensor],
    fmt: str,
    compute: torch.dtype,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], weight[0].shape[0]), dtype=dtype)


def _packed_product(
    left: list[Tensor],
    left_format: str,
    right: list[Tensor],
    right_format: str,
    compute: torch.dtype,
    length: int,
    dtype: torch.dtype,
) -> Tensor:
    """Packed [M, K] times the transpose of packed [N, K]."""
    values = _dequantize(left, left_format, 1, compute, length, compute)
    return _packed_linear(values, right, right_format, compute, None, dtype)


def _packed_product_cpu(
    left: list[Tensor],
    left_format: str,
    right: list[Tensor],
    right_format: str,
    compute: torch.dtype,
    length: int,
    dtype: torch.dtype,
) -> Tensor:
    parts = _parts(left), _parts(right)
    formats = (left_format, right_format)
    layouts = (Layout(get_block_format(name), 1, compute) for name in formats)
    reasons = [products.why_not(p, at, length) for p, at in zip(parts, layouts, strict=True)]
    if any(reasons) or not products.gives(dtype):
        return _packed_product(left, left_format, right, right_format, compute, length, dtype)
    x, w = (products.Matrix(p, fmt, length) for p, fmt in zip(parts, formats, strict=True))
    return products.linear_packed(x, w, dtype)


def _packed_product_fake(
    left: list[Tensor],
    left_format: str,
    right: list[Tensor],
    right_format: str,
    compute: torch.dtype,
    length: int,
    dtype: torch.dtype,
) -> Tensor:
    return left[0].new_empty((left[0].shape[0], right[0].shape[0]), dtype=dtype)


_define(
    "packed_linear(Tensor x, Tensor[] weight, str format, ScalarType compute, Tensor? bias, "
    "ScalarType dtype) -> Tensor",
    _packed_linear,
    _packed_linear_fake,
)
_define(
    "packed_product(Tensor[] left, str left_format, Tensor[] right, str right_format, "
    "ScalarType compute, SymInt length, ScalarType dtype) -> Tensor",
    _packed_product,
    _packed_product_fake,
)
_library.impl("packed_linear", _packed_linear_cpu, "CPU")
_library.impl("packed_product", _packed_product_cpu, "CPU")


# ---------------------------------------------------------------- random rotations


def _rotation_fake(left: Tensor, right: Tensor, size: int) -> Tensor:
    return left.new_empty((size, size), dtype=torch.float64)


# It takes the operands, one of which is a gradient: what depends on nothing compiled code draws
# twice, in the forward graph for one operand and in the backward graph for the other.
_library.define(
    "rotation(Tensor left, Tensor right, int size) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)
_library.impl("rotation", rotation.draw, "CompositeExplicitAutograd")
torch.library.register_fake("microscale::rotation", _rotation_fake, lib=_library)


# ---------------------------------------------------------------- calls past the dispatcher

# Dispatch keys of tensors that go to the CPU's kernels and nowhere else: made with and without
# inference mode. Subclasses, transforms, lazy negations and other devices have more or others.
_KEYS: frozenset[int]
with torch.inference_mode():
    _inference = torch.empty(0)
_KEYS = frozenset(torch._C._dispatch_keys(x).raw_repr() for x in (torch.empty(0), _inference))


def ordinary(x: object) -> TypeGuard[Tensor]:
    """Whether an operator on `x` would run the CPU's kernel and nothing besides autograd.

    Nothing is compiled, traced, transformed, or watched by a dispatch mode.
    """
    if torch.compiler.is_compiling() or type(x) not in _PLAIN:
        return False
    tensor: Any = x
    return (
        torch._C._dispatch_keys(tensor).raw_repr() in _KEYS
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()
    )


def straight(x: object) -> TypeGuard[Tensor]:
    """Whether an operator on `x` would run the CPU's kernel and nothing besides.

    Then a verb may call the kernel itself, which spares two thirds of a small cast's time.
    """
    return ordinary(x) and not (x.requires_grad and torch.is_grad_enabled())


_PLAIN = (Tensor, torch.nn.Parameter)


def decode(
    stored: Stored, layout: Layout, length: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Packed parts to values, or into `out` without a copy where nothing watches."""
    if straight(stored[0]) and (out is None or straight(out)):
        found = native.served(layout.format.name, *native.DECODING)
        if found is not None and native.decodes(stored, found, length, layout.compute):
            if out is None:
                return native.dequantize(stored, found, layout, length, dtype)
            if native.receives(out, stored):
                native.dequantize(stored, found, layout, length, dtype, out)
                native.written(out)
                return out
    operator = torch.ops.microscale.dequantize
    values: Tensor = operator(list(stored), *layout.spelled, length, dtype)
    if out is None:
        return values
    with torch.no_grad():
        return out.copy_(values.reshape(out.shape))


def _remember_dtype(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad.to(ctx.dtype), None, None, None, None, None


torch.library.register_autograd(
    "microscale::cast", _straight_through, setup_context=_remember_dtype, lib=_library
)
