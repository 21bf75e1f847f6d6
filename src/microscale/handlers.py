"""How each function of PyTorch that multiplies is run on cast operands, as a scope sees it called.

A handler is given the scope, the function and its arguments as they were written.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from microscale.functional.attention import scaled_dot_product_attention
from microscale.functional.bilinear import bilinear
from microscale.functional.contraction import (
    addbmm,
    einsum,
    inner,
    read_chain,
    read_dims,
    read_equation,
    tensordot,
)
from microscale.functional.conv import conv1d, conv2d, conv3d
from microscale.functional.conv_transpose import (
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from microscale.functional.embedding import embedding, embedding_bag
from microscale.functional.flow import add_product, backward_of, multiply
from microscale.functional.linear import linear, matmul
from microscale.functional.multihead import Projections, multi_head_attention
from microscale.functional.product import cast_pair, plain, uncastable, unfit
from microscale.functional.recurrent import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell
from microscale.functional.vector import deliver, deliver_in_place
from microscale.nn.site import Site
from microscale.products import ADDS, PRODUCTS
from microscale.weights import is_weight, mark_weight


class Scope(Protocol):
    """What a handler needs of the scope that saw a call."""

    site: Site

    def leave(self, func: Any, *args: Any, reason: str = "", **kwargs: Any) -> Any:
        """Run a product as PyTorch does, and note why."""


Handler = Callable[..., Any]


_FORWARD_ONLY = "its backward pass cannot run on cast operands as the policy asks"


def _two(*names: str) -> Handler:
    """Handle a product of two operands, the second of which may be given by one of these names."""

    def handle(scope: Scope, func: Any, *args: Any, **kwargs: Any) -> Any:
        left, right, *rest = _leading(args, kwargs, ("input",), names)
        if reason := unfit(left, right):
            return scope.leave(func, left, right, *rest, reason=reason, **kwargs)
        site, product = scope.site, PRODUCTS[func]
        with plain():
            if backward_of(left, right, site.policy, site.name, product):
                if rest or kwargs:
                    return scope.leave(func, left, right, *rest, reason=_FORWARD_ONLY, **kwargs)
                named: Any = {"policy": site.policy, "name": site.name, "product": product}
                return deliver(multiply(left, right, **named), site.policy)
            pair = cast_pair(left, right, policy=site.policy, name=site.name, product=product)
            return _delivered(func(*pair, *rest, **kwargs), (None, kwargs.get("out")), site)

    return handle


def _three(*names: str) -> Handler:
    """Handle a product of two operands that is added to a first argument."""

    def handle(scope: Scope, func: Any, *args: Any, **kwargs: Any) -> Any:
        added, left, right, *rest = _leading(args, kwargs, ("input",), names[:1], names[1:])
        if reason := unfit(left, right):
            return scope.leave(func, added, left, right, *rest, reason=reason, **kwargs)
        site, product = scope.site, PRODUCTS[func]
        with plain():
            named: Any = {"policy": site.policy, "name": site.name, "product": product}
            if not rest:
                result = add_product(added, left, right, func, **named, **kwargs)
            elif backward_of(left, right, site.policy, site.name, product):
                return scope.leave(func, added, left, right, *rest, reason=_FORWARD_ONLY, **kwargs)
            else:
                result = func(added, *cast_pair(left, right, **named), *rest, **kwargs)
            return _delivered(result, (added, kwargs.get("out")), site)

    return handle


def _delivered(result: Any, written: Sequence[Any], site: Site) -> Any:
    """Round a result, in place if it is one of the tensors that may have been written to."""
    if any(result is x for x in written):
        return deliver_in_place(result, site.policy)
    return deliver(result, site.policy) if isinstance(result, Tensor) else result


def vector_operation(site: Site, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run a function of VECTOR unseen by other scopes, and round its result if that is wanted.

    Sums are rounded where both terms are floating tensors: a residual, not an epsilon or an index.
    """
    with plain():
        result = func(*args, **kwargs)
        terms = (*args, *kwargs.values())
        if site.reason or (func in ADDS and not all(map(_is_floating, terms[:2]))):
            return result
        return _delivered(result, (*args[:1], kwargs.get("input"), kwargs.get("out")), site)


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _leading(args: Sequence[Any], kwargs: dict[str, Any], *parameters: Sequence[str]) -> list[Any]:
    """Return the arguments by position, first those of `parameters` that were given by name."""
    found = list(args)
    for names in parameters[len(found) :]:
        found += [kwargs.pop(name) for name in names if name in kwargs]
    return found


def _grouped(scope: Scope, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Handle a product of groups of rows with a matrix each, as of experts."""
    left, right, *rest = _leading(args, kwargs, ("mat_a", "input", "self"), ("mat_b", "mat2"))
    if left.dim() != 2 or right.dim() != 3:
        reason = "grouped products other than of rows with a matrix each are not cast"
        return scope.leave(func, left, right, *rest, reason=reason, **kwargs)
    return _two("mat_b", "mat2")(scope, func, left, right, *rest, **kwargs)


GATHERS = (Tensor.__getitem__, torch.index_select, Tensor.index_select)
"""How experts are picked from a fused weight: what these give of a parameter is a weight too."""


def gather(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run a function of GATHERS; matrices that it copies out of a parameter stay weights."""
    result = func(*args, **kwargs)
    source = args[0] if args else kwargs.get("input")
    matrices = isinstance(source, Tensor) and source.dim() > 2 and is_weight(source)
    copied = matrices and isinstance(result, Tensor) and not is_weight(result)
    return mark_weight(result) if copied else result


def _reflected(scope: Scope, func: Any, right: Tensor, left: Tensor) -> Tensor:  # noqa: ARG001
    return matmul(left, right, policy=scope.site.policy, name=scope.site.name)


def _inner(scope: Scope, func: Any, *args: Any, **kwargs: Any) -> Any:
    left, right, *rest = _leading(args, kwargs, ("input",), ("other",))
    if not left.dim() or not right.dim() or rest or kwargs:
        kwargs["reason"] = "a product with a number, or with an `out`, is not cast"
        return scope.leave(func, left, right, *rest, **kwargs)
    return _joined(scope, func, inner, left, right)


def _tensordot(scope: Scope, func: Any, *args: Any, **kwargs: Any) -> Any:
    left, right, *rest = _leading(args, kwargs, ("a",), ("b",), ("dims",))
    dims = rest[0] if rest else 2
    found = read_dims(left, right, dims)
    if isinstance(found, str) or kwargs.get("out") is not None:
        reason = found if isinstance(found, str) else "an `out` is not filled with cast products"
        return scope.leave(func, left, right, dims, reason=reason, **kwargs)
    return _joined(scope, func, tensordot, left, right, dims)


def _einsum(scope: Scope, func: Any, equation: str, *operands: Any) -> Any:
    tensors = (
        operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    )
    if len(tensors) > 2:
        return _chained(scope, func, equation, tensors)
    found = read_equation(equation, tensors)
    if isinstance(found, str):
        return scope.leave(func, equation, *tensors, reason=found)
    left, right = tensors
    site = scope.site
    if reason := uncastable(left, right):
        return scope.leave(func, equation, left, right, reason=reason)
    return einsum(equation, left, right, policy=site.policy, name=site.name)


def _chained(scope: Scope, func: Any, equation: str, tensors: Sequence[Tensor]) -> Any:
    """Several operands, two at a time; each step is quantized or left for itself."""
    steps = read_chain(equation, tensors)
    if isinstance(steps, str):
        return scope.leave(func, equation, *tensors, reason=steps)
    total = tensors[0]
    for step, x in zip(steps, tensors[1:], strict=True):
        total = _einsum(scope, func, step, total, x)
    return total


def _addbmm(scope: Scope, func: Any, *args: Any, **kwargs: Any) -> Any:
    added, left, right, *_ = _leading(args, kwargs, ("input",), ("batch1",), ("batch2",))
    if reason := uncastable(left, right) or (kwargs.get("out") is not None and "it has an `out`"):
        return scope.leave(func, added, left, right, reason=reason, **kwargs)
    scales = {key: kwargs[key] for key in ("beta", "alpha") if key in kwargs}
    site = scope.site
    result = addbmm(added, left, right, **scales, policy=site.policy, name=site.name)
    return added.copy_(result) if func is Tensor.addbmm_ else result


def _joined(scope: Scope, func: Any, function: Callable[..., Tensor], *args: Any) -> Any:
    if reason := uncastable(args[0], args[1]):
        return scope.leave(func, *args, reason=reason)
    return function(*args, policy=scope.site.policy, name=scope.site.name)


def _same(function: Callable[..., Tensor]) -> Handler:
    """Handle a function of torch by the one of the same arguments here."""

    def handle(scope: Scope, func: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG001
        return function(*args, **kwargs, policy=scope.site.policy, name=scope.site.name)

    return handle


def _table(function: Callable[..., Tensor]) -> Handler:
    """Handle a look-up, unless it writes into its table."""

    def handle(scope: Scope, func: Any, *args: Any, **kwargs: Any) -> Any:
        max_norm = args[3] if len(args) > 3 else kwargs.get("max_norm")
        if max_norm is not None:
            return scope.leave(func, *args, reason="max_norm rescales the table", **kwargs)
        return _same(function)(scope, func, *args, **kwargs)

    return handle


def _multi_head_attention(  # noqa: PLR0913, PLR0917  (the signature of torch)
    scope: Scope,
    func: Any,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,  # noqa: ARG001
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    *,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    average_attn_weights: bool = True,
    **_: object,
) -> tuple[Tensor, Tensor | None]:
    """Handle `F.multi_head_attention_forward`, which subclasses of its module end up in."""
    separate = q_proj_weight, k_proj_weight, v_proj_weight
    weight: Any = separate if use_separate_proj_weight else in_proj_weight
    policy, name = scope.site.policy, scope.site.name
    heads, probabilities = multi_head_attention(
        query,
        key,
        value,
        Projections(num_heads, weight, in_proj_bias, bias_k, bias_v, add_zero_attn),
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        dropout_p=dropout_p if training else 0.0,
        policy=policy,
        name=name,
    )
    output = linear(heads, out_proj_weight, out_proj_bias, policy=policy, name=name)
    if not need_weights:
        return output, None
    return output, probabilities.mean(-3) if average_attn_weights else probabilities


def _recurrent(function: Callable[..., Any], **options: str) -> Handler:
    """Handle `torch.lstm` and its kin, for padded and for packed sequences."""

    def handle(scope: Scope, func: Any, data: Tensor, *args: Any) -> Any:  # noqa: ARG001
        packed = isinstance(args[0], Tensor) and not args[0].is_floating_point()
        if packed:
            sizes, state, flat, _, layers, dropout, training, bidirectional = args
        else:
            state, flat, _, layers, dropout, training, bidirectional, batch_first = args
        swap = not packed and batch_first
        each = len(flat) // (layers * (2 if bidirectional else 1))
        output, final = function(
            data.transpose(0, 1) if swap else data,
            state,
            [flat[i : i + each] for i in range(0, len(flat), each)],
            batch_sizes=sizes.tolist() if packed else None,
            bidirectional=bidirectional,
            dropout_p=dropout if training else 0.0,
            policy=scope.site.policy,
            name=scope.site.name,
            **options,
        )
        finals = final if isinstance(final, tuple) else (final,)
        return (output.transpose(0, 1) if swap else output), *finals

    return handle


def _cell(function: Callable[..., Any], **options: str) -> Handler:
    def handle(scope: Scope, func: Any, data: Tensor, state: Any, *weights: Any) -> Any:  # noqa: ARG001
        given = [w for w in weights if w is not None]
        site = scope.site
        return function(data, state, given, policy=site.policy, name=site.name, **options)

    return handle


HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _two("other")),
    **dict.fromkeys((torch.linalg.matmul,), _two("other")),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), _two("mat2")),
    **dict.fromkeys((torch.addmm, Tensor.addmm, Tensor.addmm_), _three("mat1", "mat2")),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm, Tensor.baddbmm_), _three("batch1", "batch2")),
    Tensor.__rmatmul__: _reflected,
    **{f: _grouped for f, name in PRODUCTS.items() if name == "grouped_mm"},
    **dict.fromkeys((torch.mv, Tensor.mv), _two("vec")),
    **dict.fromkeys((torch.addmv, Tensor.addmv, Tensor.addmv_), _three("mat", "vec")),
    **dict.fromkeys((torch.dot, Tensor.dot), _two("tensor")),
    **dict.fromkeys((torch.vdot, Tensor.vdot), _two("other")),
    **dict.fromkeys((torch.inner, Tensor.inner), _inner),
    **dict.fromkeys((torch.addbmm, Tensor.addbmm, Tensor.addbmm_), _addbmm),
    torch.tensordot: _tensordot,
    torch.einsum: _einsum,
    torch.conv1d: _same(conv1d),
    torch.conv2d: _same(conv2d),
    torch.conv3d: _same(conv3d),
    torch.conv_transpose1d: _same(conv_transpose1d),
    torch.conv_transpose2d: _same(conv_transpose2d),
    torch.conv_transpose3d: _same(conv_transpose3d),
    F.linear: _same(linear),
    F.bilinear: _same(bilinear),
    F.embedding: _table(embedding),
    F.embedding_bag: _table(embedding_bag),
    F.scaled_dot_product_attention: _same(scaled_dot_product_attention),
    F.multi_head_attention_forward: _multi_head_attention,
    torch.lstm: _recurrent(lstm),
    torch.gru: _recurrent(gru),
    torch.rnn_tanh: _recurrent(rnn, nonlinearity="tanh"),
    torch.rnn_relu: _recurrent(rnn, nonlinearity="relu"),
    torch.lstm_cell: _cell(lstm_cell),
    torch.gru_cell: _cell(gru_cell),
    torch.rnn_tanh_cell: _cell(rnn_cell, nonlinearity="tanh"),
    torch.rnn_relu_cell: _cell(rnn_cell, nonlinearity="relu"),
}
