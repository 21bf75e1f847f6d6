"""Attention, with its two products on cast operands.

Scores are queries times keys, both cast along the head dimension; values are probabilities times
values, both cast along the keys, where a block spans 32 tokens. A value row that no query may
look at is zeroed before the cast, so that padding has no say in the scale of its block.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from microscale.errors import MicroscaleError
from microscale.functional.flow import MATMUL, backward_of, flow
from microscale.functional.product import UNSET, plain
from microscale.functional.vector import deliver
from microscale.ledger import note, recording
from microscale.operands import Operand
from microscale.policy import Policy
from microscale.weights import cast_operand

LOOKS_AHEAD = "causal, but the scale of a block of values sees its later tokens"

Operands = tuple[Operand | None, Operand | None]


def scaled_dot_product_attention(  # noqa: PLR0917  (as in torch)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    policy: Policy,
    name: str = "",
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` on cast operands.

    Args:
        query: [..., H, L, E].
        key: [..., H, S, E]; with `enable_gqa` fewer heads, which divide those of the query.
        value: [..., H, S, Ev].
        attn_mask: broadcastable to [..., L, S]; True or added 0 means taking part.
        dropout_p: of the probabilities.
        is_causal: query i sees keys 0 to i.
        scale: of the scores, 1 / sqrt(E) by default.
        enable_gqa: repeat the heads of key and value for groups of query heads.
        policy: `matmul.left` and `matmul.right`, with the switches `scores` and `values`.
        name: of the module, for ledgers.

    Returns:
        [..., H, L, Ev]. A query that may look at nothing gives zeros, as in torch.

    Raises:
        MicroscaleError: both a mask and `is_causal` are given.
    """
    if attn_mask is not None and is_causal:
        raise MicroscaleError("attention takes attn_mask or is_causal=True, not both.")
    note_attention(policy, name, causal=is_causal)
    with plain():
        quantized = _operands(policy, "scores") + _operands(policy, "values")
        if policy.vector == "float32" and not any(quantized):
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        if enable_gqa:
            key, value = (
                x.repeat_interleave(query.size(-3) // x.size(-3), -3) for x in (key, value)
            )
        mask = _causal(query, key) if is_causal else attn_mask
        return attend(query, key, value, mask, dropout_p, scale, policy=policy, name=name)[0]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    *,
    policy: Policy,
    name: str = "",
) -> tuple[Tensor, Tensor]:
    """Return the result of attention and its probabilities (after dropout, not cast)."""
    left, right = _operands(policy, "scores")
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    backward = backward_of(query, key, policy, name, "scores") if left or right else None
    casts = cast_operand(query, left, -1), cast_operand(key, right, -1).mT
    scores = flow(MATMUL, *casts, None, (query, key.mT), backward) * factor
    probabilities = deliver(_softmax(deliver(scores, policy), mask), policy)
    if dropout_p > 0:
        probabilities = F.dropout(probabilities, dropout_p)
    left, right = _operands(policy, "values")
    if right is not None and mask is not None:
        value = _without_unseen(value, mask)
    backward = backward_of(probabilities, value, policy, name, "values") if left or right else None
    casts = cast_operand(probabilities, left, -1), cast_operand(value, right, -2)
    result = flow(MATMUL, *casts, None, (probabilities, value), backward)
    return deliver(result, policy), probabilities


def _operands(policy: Policy, product: str) -> Operands:
    matmul = policy.matmul
    wanted = matmul.scores if product == "scores" else matmul.values
    return (matmul.left, matmul.right) if wanted else (None, None)


def note_attention(policy: Policy, name: str, *, causal: bool = False) -> None:
    """Note both products of attention, and what a reader of causal models' results should know."""
    if not recording():
        return
    for product in ("scores", "values"):
        operands = _operands(policy, product)
        if any(operands):
            ahead = LOOKS_AHEAD if causal and product == "values" and operands[1] else ""
            note(name, product, "emulated", operands, ahead)
        else:
            off = any((policy.matmul.left, policy.matmul.right))
            reason = f"the policy has matmul.{product} = false" if off else UNSET
            note(name, product, "skipped", operands, reason)


def _causal(query: Tensor, key: Tensor) -> Tensor:
    shape = query.shape[-2], key.shape[-2]
    return torch.ones(shape, dtype=torch.bool, device=query.device).tril()


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return probabilities; a row that may look at nothing gives zeros, and its gradient too."""
    if mask is None:
        return scores.softmax(-1)
    if mask.dtype == torch.bool:
        masked = scores.masked_fill(~mask, -math.inf)
    else:
        masked = (scores + mask).to(scores.dtype)
    blind = (masked == -math.inf).all(-1, keepdim=True)
    return masked.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


def _without_unseen(value: Tensor, mask: Tensor) -> Tensor:
    """Zero the rows of `value` that are masked for every query."""
    # Many models mask with the smallest finite number instead of -inf.
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    seen = torch.atleast_2d(allowed).any(-2)
    return value.masked_fill(~seen.unsqueeze(-1), 0.0)
