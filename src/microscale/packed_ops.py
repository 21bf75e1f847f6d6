"""What PyTorch's operators do with packed tensors: one entry an operator, all others refused.

Operators away from the block axis work on the parts; products and gathers of rows decode what
they need; anything else raises MicroscaleError with the operator's name.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from microscale import ops
from microscale.errors import MicroscaleError
from microscale.formats import row_dimension
from microscale.kernels.native import products
from microscale.kernels.plan import FLOATS
from microscale.kernels.storage import Stored
from microscale.packed import Packed
from microscale.rounding import Options

aten = torch.ops.aten
Handler = TypeVar("Handler", bound=Callable[..., Any])
_HANDLERS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}


def _handles(*overloads: torch._ops.OpOverload) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(overloads, handler))
        return handler

    return register


def dispatch(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `func`; raises MicroscaleError for an operator that packed tensors do not support."""
    handler = _HANDLERS.get(func)
    if handler is not None:
        return handler(func, *args, **kwargs)
    raise MicroscaleError(
        f"{func} does not support a BlockTensor ({_describe(args)}); call it on x.dequantize()."
    )


def _describe(args: Iterable[Any]) -> str:
    return next((repr(a) for a in args if isinstance(a, Packed)), "inside a list")


def _with(
    q: Packed,
    codes: Tensor,
    axis: int,
    shape: Iterable[int],
    shared: Callable[[Tensor], Tensor],
) -> Packed:
    """The tensor of new codes; `shared` changes what each block has one of."""
    zero_point = shared(q.zero_point) if q.format.zero_point else q.zero_point
    stored = (codes, shared(q.scales), q.tensor_scale, zero_point)
    return type(q)(stored, q.packing._replace(axis=axis), tuple(shape), q.dtype)


def _of_each(q: Packed, function: Callable[[Tensor], Tensor]) -> Packed:
    codes, scales, tensor_scale, zero_point = map(function, q.stored)
    return type(q)((codes, scales, tensor_scale, zero_point), q.packing, q.shape, q.dtype)


def _stored_dimension(q: Packed, dimension: int, func: torch._ops.OpOverload) -> int:
    """The place of a logical dimension in the parts; the block axis is refused."""
    dimension %= q.dim()
    if dimension == q.axis:
        raise MicroscaleError(
            f"{func} along the block axis {dimension} of {q!r} would cut blocks; "
            "call it on x.dequantize()."
        )
    return dimension - (dimension > q.axis)


# ---------------------------------------------------------------- copies


@_handles(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _alias(func: torch._ops.OpOverload, q: Packed) -> Packed:
    return _of_each(q, func)


@_handles(aten.clone.default)
def _clone(func: torch._ops.OpOverload, q: Packed, **_: Any) -> Packed:
    return _of_each(q, Tensor.clone)


@_handles(aten._to_copy.default)
def _to(func: torch._ops.OpOverload, q: Packed, **keywords: Any) -> Packed:
    dtype = keywords.get("dtype") or q.dtype
    if dtype not in FLOATS:
        raise MicroscaleError(
            f"a BlockTensor cannot have dtype {dtype}; call x.dequantize() first."
        )
    device = keywords.get("device") or q.device
    moved = _of_each(q, lambda part: part.to(device, copy=True))
    return type(q)(moved.stored, q.packing, q.shape, dtype)


@_handles(aten.copy_.default)
def _copy(func: torch._ops.OpOverload, target: Tensor, source: Tensor, *_: Any) -> Tensor:
    if not isinstance(target, Packed):
        assert isinstance(source, Packed)
        return target.copy_(source.dequantize())
    if target.shape != source.shape:
        raise MicroscaleError(
            f"cannot copy shape {tuple(source.shape)} into {target!r}; the shapes must agree."
        )
    for mine, theirs in zip(target.stored, _stored_like(target, source), strict=True):
        mine.copy_(theirs)
    return target


def _stored_like(target: Packed, source: Tensor) -> Stored:
    """The parts of `source` in the format and along the axis of `target`."""
    if isinstance(source, Packed):
        if source.packing == target.packing:
            return source.stored
        source = source.dequantize()
    spelled = (target.format.name, target.axis, str(Options()))
    values = source.detach().to(target.packing.compute)
    stored: Stored = torch.ops.microscale.quantize(values, *spelled, None)
    return stored


@_handles(aten.equal.default)
def _equal(func: torch._ops.OpOverload, a: Tensor, b: Tensor) -> bool:
    return torch.equal(_decoded(a), _decoded(b))


# ---------------------------------------------------------------- away from the block axis


@_handles(aten.select.int)
def _select(func: torch._ops.OpOverload, q: Packed, dim: int = 0, index: int = 0) -> Packed:
    q = q.with_row_scales()
    stored = _stored_dimension(q, dim, func)
    # A dimension that shares one scale has size 1 there.
    place = index if q.scales.shape[stored] > 1 else 0
    shape = [size for d, size in enumerate(q.shape) if d != dim % q.dim()]
    axis = q.axis - (dim % q.dim() < q.axis)
    codes = q.codes.select(stored, index)
    return _with(q, codes, axis, shape, lambda part: part.select(stored, place))


@_handles(aten.slice.Tensor)
def _slice(
    func: torch._ops.OpOverload,
    q: Packed,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Packed:
    whole = (start or 0) == 0 and (end is None or end >= q.shape[dim]) and step == 1
    if whole:
        return _of_each(q, aten.alias.default)
    q = q.with_row_scales()
    stored = _stored_dimension(q, dim, func)

    def cut(part: Tensor) -> Tensor:
        if part.shape[stored] == 1:
            return part
        piece: Tensor = aten.slice.Tensor(part, stored, start, end, step)
        return piece

    codes = aten.slice.Tensor(q.codes, stored, start, end, step)
    shape = list(q.shape)
    shape[dim] = codes.shape[stored]
    return _with(q, codes, q.axis, shape, cut)


@_handles(aten.split.Tensor, aten.split_with_sizes.default)
def _split(
    func: torch._ops.OpOverload, q: Packed, sizes: int | list[int], dim: int = 0
) -> list[Packed]:
    total = q.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    pairs = zip(ends, sizes, strict=True)
    return [_slice(aten.slice.Tensor, q, dim, end - size, end) for end, size in pairs]


@_handles(aten.unbind.int)
def _unbind(func: torch._ops.OpOverload, q: Packed, dim: int = 0) -> list[Packed]:
    return [_select(aten.select.int, q, dim, index) for index in range(q.shape[dim])]


@_handles(aten.permute.default)
def _permute(func: torch._ops.OpOverload, q: Packed, dims: list[int]) -> Packed:
    dims = [d % q.dim() for d in dims]
    axis, rows = dims.index(q.axis), row_dimension(q.dim(), q.axis)
    if rows is not None and dims.index(rows) != row_dimension(q.dim(), axis):
        q = q.with_row_scales()
    order = [d - (d > q.axis) for d in dims if d != q.axis] + [q.dim() - 1]
    shape = [q.shape[d] for d in dims]
    return _with(q, q.codes.permute(order), axis, shape, lambda part: part.permute(order))


@_handles(aten.transpose.int)
def _transpose(func: torch._ops.OpOverload, q: Packed, a: int, b: int) -> Packed:
    dims = list(range(q.dim()))
    dims[a], dims[b] = dims[b], dims[a]
    return _permute(func, q, dims)


@_handles(aten.t.default)
def _t(func: torch._ops.OpOverload, q: Packed) -> Packed:
    return _permute(func, q, list(range(q.dim()))[::-1])


@_handles(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.expand.default,
)
def _view(func: torch._ops.OpOverload, q: Packed, *args: Any, **kwargs: Any) -> Packed:
    shape = func(torch.empty(q.shape, device="meta"), *args, **kwargs).shape
    if shape == q.shape:
        return _of_each(q, aten.alias.default)
    q = q.with_row_scales()
    axis = _axis_in(shape, q)
    if axis is None:
        raise MicroscaleError(
            f"{func} to shape {tuple(shape)} would cut or join the block axis {q.axis} of {q!r}; "
            "call it on x.dequantize()."
        )
    rest = (*shape[:axis], *shape[axis + 1 :])
    before = q.codes.shape[:-1]

    def change(part: Tensor) -> Tensor:
        if func is aten.expand.default:
            return part.expand(*before, -1).expand(*rest, -1)
        return part.expand(*before, -1).reshape(*rest, part.shape[-1])

    return _with(q, change(q.codes), axis, shape, change)


def _axis_in(shape: torch.Size, q: Packed) -> int | None:
    """The place of the block axis in a new shape that leaves it whole, or None."""
    before, after = math.prod(q.shape[: q.axis]), math.prod(q.shape[q.axis + 1 :])
    expanded = math.prod(shape) != math.prod(q.shape)
    for axis, size in enumerate(shape):
        same = (math.prod(shape[:axis]), math.prod(shape[axis + 1 :])) == (before, after)
        if size == q.length and (same or (expanded and len(shape) - axis == q.dim() - q.axis)):
            return axis
    return None


@_handles(aten.index.Tensor)
def _index(func: torch._ops.OpOverload, q: Packed, indices: list[Tensor | None]) -> Packed:
    given = [d for d, index in enumerate(indices) if index is not None]
    mask = indices[0] is not None and indices[0].dtype in (torch.bool, torch.uint8)
    spanned = indices[0].dim() if mask and indices[0] is not None else 1
    if given != [0] or q.axis == 0 or spanned != 1:
        raise MicroscaleError(
            f"indexing {q!r} with tensors works on dimension 0 alone, away from the block axis; "
            "call it on x.dequantize()."
        )
    index, q = indices[0], q.with_row_scales()
    assert index is not None
    codes, rows = q.codes[index], q.codes.shape[0]
    added = codes.dim() - q.codes.dim()

    def gather(part: Tensor) -> Tensor:
        return (part[index] if part.shape[0] == rows else part).expand(*codes.shape[:-1], -1)

    return _with(q, codes, q.axis + added, (*codes.shape[: added + 1], *q.shape[1:]), gather)


@_handles(aten.index_select.default)
def _index_select(func: torch._ops.OpOverload, q: Packed, dim: int, index: Tensor) -> Packed:
    q = q.with_row_scales()
    stored = _stored_dimension(q, dim, func)
    size = q.codes.shape[stored]

    def gather(part: Tensor) -> Tensor:
        return part.index_select(stored, index) if part.shape[stored] == size else part

    shape = list(q.shape)
    shape[dim] = index.numel()
    return _with(q, gather(q.codes), q.axis, shape, gather)


# ---------------------------------------------------------------- products


def _decoded(x: Any) -> Any:
    return x.dequantize() if isinstance(x, Packed) else x


@_handles(
    aten.bmm.default,
    aten.baddbmm.default,
    aten.dot.default,
    aten.matmul.default,
    aten.convolution.default,
    aten.convolution_backward.default,
)
def _product(func: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    return func(*map(_decoded, args), **kwargs)


@_handles(aten.mm.default)
def _mm(func: torch._ops.OpOverload, left: Tensor, right: Tensor) -> Any:
    result = _rows_product(left, right)
    return _product(func, left, right) if result is None else result


@_handles(aten.mv.default)
def _mv(func: torch._ops.OpOverload, matrix: Tensor, vector: Tensor) -> Any:
    result = None
    if isinstance(matrix, Packed) and not isinstance(vector, Packed):
        result = _rows_product(vector.unsqueeze(0), _t(aten.t.default, matrix))
    return _product(func, matrix, vector) if result is None else result[0]


@_handles(aten.addmm.default)
def _addmm(
    func: torch._ops.OpOverload,
    added: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Any:
    plain = beta == alpha == 1 and added.dim() == 1 and not isinstance(added, Packed)
    if plain and added.shape[0] == right.shape[1] and added.dtype is left.dtype:
        result = _rows_product(left, right, added)
        if result is not None:
            return result
    return _product(func, added, left, right, beta=beta, alpha=alpha)


@_handles(aten.addmv.default)
def _addmv(
    func: torch._ops.OpOverload, added: Tensor, matrix: Tensor, vector: Tensor, **kwargs: Any
) -> Any:
    return _product(func, added, matrix, vector, **kwargs)


@_handles(aten.linear.default)
def _linear(
    func: torch._ops.OpOverload, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Any:
    if isinstance(weight, Packed) and not isinstance(x, Packed) and weight.dim() == 2 and x.dim():
        result = _rows_product(x.reshape(-1, x.shape[-1]), _t(aten.t.default, weight), bias)
        if result is not None:
            return result.reshape(*x.shape[:-1], -1)
    return _product(func, x, weight, bias)


def _rows_product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Left [M, K] times right [K, N] from packed storage, or None where it must be decoded."""
    fits = left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0]
    if not fits or left.dtype is not right.dtype or left.device != right.device:
        return None
    if isinstance(left, Packed) and isinstance(right, Packed):
        return _packed_pair(left, right) if bias is None else None
    if isinstance(right, Packed) and right.axis == 0 and not unserved(right):
        return _packed_linear(left, right, bias)
    if isinstance(left, Packed) and left.axis == 1 and bias is None and not unserved(left):
        return _packed_linear(right.t(), left, None).t()
    return None


def quick_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """`torch.nn.functional.linear` by one call of the core, or None where more has to happen.

    That is: where gradients, transforms, modes or compilers watch, or the core does not serve.
    """
    if not isinstance(weight, Packed) or not ops.straight(x):
        return None
    matrix = _matrix(weight)
    # The weight's own dtype and shape are slow to ask for: a subclass of Tensor is asked in Python.
    if matrix is None or x.dtype is not matrix.dtype or not x.dim():
        return None
    if bias is not None and not _adds(bias, matrix):
        return None
    if x.shape[-1] != matrix.columns or not products.takes(x, x.dtype):
        return None
    return products.linear(x, matrix, bias)


def _adds(bias: Tensor, matrix: products.Matrix) -> bool:
    same = bias.dtype is matrix.dtype and bias.dim() == 1 and bias.shape[0] == matrix.rows
    return same and ops.straight(bias)


def _matrix(q: Packed) -> products.Matrix | None:
    """What the core knows of a packed weight [N, K], kept with it; None if it does not serve."""
    kept: products.Matrix | None = q.__dict__.get("_matrix")
    if kept is None or not kept.holds(q.stored):
        served = q.axis == 1 and not unserved(q)
        kept = products.Matrix(q.stored, q.format.name, q.length, q.dtype) if served else None
        q.__dict__["_matrix"] = kept
    return kept


def unserved(q: Packed) -> str:
    """Why products do not read a matrix from its packed storage, but decode it first, or ""."""
    if q.dim() != 2:
        return f"{q.dim()} dimensions"
    return products.why_not(q.stored, q.packing, q.length)


def _packed_linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    spelled = (weight.format.name, weight.packing.compute)
    result: Tensor = torch.ops.microscale.packed_linear(
        x, list(weight.stored), *spelled, bias, x.dtype
    )
    return result


def _packed_pair(left: Packed, right: Packed) -> Tensor | None:
    fits = left.axis == 1 and right.axis == 0 and left.packing.compute is right.packing.compute
    if not fits or unserved(left) or unserved(right):
        return None
    result: Tensor = torch.ops.microscale.packed_product(
        list(left.stored),
        left.format.name,
        list(right.stored),
        right.format.name,
        left.packing.compute,
        left.length,
        left.dtype,
    )
    return result


@_handles(aten.embedding.default)
def _embedding(func: torch._ops.OpOverload, table: Packed, indices: Tensor, *_: Any) -> Tensor:
    rows = _index_select(aten.index_select.default, table, 0, indices.reshape(-1))
    return rows.dequantize().reshape(*indices.shape, -1)
