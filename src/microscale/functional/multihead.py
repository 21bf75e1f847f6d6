"""Multi-head attention up to its output projection: three projections, then heads side by side."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from microscale.errors import MicroscaleError
from microscale.functional.attention import attend, note_attention
from microscale.functional.flow import LINEAR, backward_of, flow
from microscale.functional.product import cast_right, note_product, plain
from microscale.functional.vector import deliver
from microscale.policy import Policy
from microscale.watch import tell_product
from microscale.weights import cast_operand

Three = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Projections:
    """What a multi-head attention holds besides its output projection.

    Attributes:
        num_heads: divides E.
        weight: [3 E, E], or the three weights [E, in] of query, key and value.
        bias: [3 E].
        bias_k: [1, 1, E], one more key for every sequence.
        bias_v: [1, 1, E], its value.
        add_zero_attn: whether there is one more key and value of zeros.
    """

    num_heads: int
    weight: Tensor | Three
    bias: Tensor | None = None
    bias_k: Tensor | None = None
    bias_v: Tensor | None = None
    add_zero_attn: bool = False


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projections: Projections,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    policy: Policy,
    name: str = "",
) -> tuple[Tensor, Tensor]:
    """Project queries, keys and values, and let the heads attend.

    Args:
        query: [L, N, E], or [L, E] without a batch.
        key: [S, N, in].
        value: [S, N, in].
        projections: the weights.
        attn_mask: [L, S] or [N x heads, L, S]; True or added -inf means left out, as in
            `torch.nn.MultiheadAttention`.
        key_padding_mask: [N, S], or [S] without a batch; likewise.
        dropout_p: of the probabilities.
        policy: `forward` for the projections, `matmul` for the two products of attention.
        name: of the module, for ledgers.

    Returns:
        [L, N, E], before the output projection, and the probabilities [N, heads, L, S]; without N
        if there is no batch.
    """
    with plain():
        if query.dim() == 3:
            masks = _mask(attn_mask, query.dtype), _mask(key_padding_mask, query.dtype)
            inputs = query, key, value
            return _attend(inputs, projections, masks, dropout_p, policy=policy, name=name)
        padding = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        masks = _mask(attn_mask, query.dtype), _mask(padding, query.dtype)
        inputs = _unsqueezed(query, key, value)
        output, probabilities = _attend(
            inputs, projections, masks, dropout_p, policy=policy, name=name
        )
        return output.squeeze(1), probabilities.squeeze(0)


def _unsqueezed(query: Tensor, key: Tensor, value: Tensor) -> Three:
    """Add a batch; what was one tensor stays one, so that it is cast once."""
    query_ = query.unsqueeze(1)
    key_ = query_ if key is query else key.unsqueeze(1)
    return query_, key_, key_ if value is key else value.unsqueeze(1)


def _attend(
    inputs: Three,
    projections: Projections,
    masks: tuple[Tensor | None, Tensor | None],
    dropout_p: float,
    *,
    policy: Policy,
    name: str,
) -> tuple[Tensor, Tensor]:
    query, key, value = _project(inputs, projections, policy, name)
    batch, heads = query.shape[1], projections.num_heads
    if projections.bias_k is not None and projections.bias_v is not None:
        key = torch.cat([key, projections.bias_k.expand(1, batch, -1)])
        value = torch.cat([value, projections.bias_v.expand(1, batch, -1)])
    if projections.add_zero_attn:
        key, value = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (key, value))
    mask = _merge(masks, (batch, heads), len(key))
    q, k, v = (x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for x in (query, key, value))
    note_attention(policy, name)
    result, probabilities = attend(q, k, v, mask, dropout_p, policy=policy, name=name)
    return result.permute(2, 0, 1, 3).flatten(-2), probabilities


def _project(inputs: Three, projections: Projections, policy: Policy, name: str) -> Three:
    query, key, value = inputs
    weight, operands = projections.weight, policy.forward
    stored: tuple[Tensor, ...]
    if isinstance(weight, tuple):
        stored, weights = weight, [cast_right(w, operands.weight, -1) for w in weight]
    else:
        stored = weight.chunk(3)
        weights = list(cast_right(weight, operands.weight, -1).chunk(3))
    biases = (None,) * 3 if projections.bias is None else projections.bias.chunk(3)
    left = cast_operand(query, operands.input, -1)
    middle = left if key is query else cast_operand(key, operands.input, -1)
    right = middle if value is key else cast_operand(value, operands.input, -1)
    for x, w in zip(inputs, stored, strict=True):
        note_product(name, "linear", (x, operands.input), (w, operands.weight))
    for x, cast, w in zip(inputs, (left, middle, right), stored, strict=True):
        tell_product("matrix", x, cast, w, operands.weight, -1)
    factors = zip((left, middle, right), weights, biases, inputs, stored, strict=True)
    q, k, v = (
        deliver(flow(LINEAR, a, b, bias, (x, w), backward_of(x, w, policy, name, "linear")), policy)
        for a, b, bias, x, w in factors
    )
    return q, k, v


def _mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the mask as numbers to add."""
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise MicroscaleError(f"attention mask of {mask.dtype}; give a boolean or a float mask.")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _merge(
    masks: tuple[Tensor | None, Tensor | None], shape: tuple[int, int], keys: int
) -> Tensor | None:
    """Join both masks to one that fits [N, heads, L, keys]; added keys are open to all."""
    attention, padding = masks
    if attention is not None and attention.dim() == 3:
        attention = attention.unflatten(0, shape)
    if padding is not None:
        padding = padding[:, None, None, :]
    open_to_all = [F.pad(m, (0, keys - m.shape[-1])) for m in (attention, padding) if m is not None]
    return sum(open_to_all[1:], start=open_to_all[0]) if open_to_all else None
