"""Embedding tables, cast along features as `policy.storage` says."""

import torch
import torch.nn.functional as F
from torch import Tensor

from microscale.errors import MicroscaleError
from microscale.formats import BlockFormat
from microscale.functional.product import cast_right, note_product, plain
from microscale.operands import Operand
from microscale.policy import Policy
from microscale.tensor import BlockTensor
from microscale.watch import tell_product
from microscale.weights import cast_operand, cast_weight


def embedding(  # noqa: PLR0917  (as in torch)
    input: Tensor,  # noqa: A002  (the name in torch)
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    policy: Policy,
    name: str = "",
) -> Tensor:
    """`torch.nn.functional.embedding` on a table cast along features.

    Where every row has scales of its own, rows are looked up first and only these are cast, which
    gives the same values and keeps no second table.

    Args:
        input: integers of any shape.
        weight: [rows, features]; a BlockTensor is used as it is.
        padding_idx: row that receives no gradient.
        max_norm: refused: it writes into the table.
        norm_type: of max_norm.
        scale_grad_by_freq: as in torch.
        sparse: whether the table's gradient is sparse.
        policy: `storage` is used.
        name: of the module, for ledgers.

    Returns:
        [*input.shape, features].

    Raises:
        MicroscaleError: `max_norm` is set.
    """
    if max_norm is not None:
        raise _rescales("embedding", name, max_norm, norm_type)
    operand = policy.storage
    note_product(name, "embedding", (weight, operand), (weight, operand))
    tell_product("table", input, input, weight, operand, -1)
    options = (padding_idx, None, 2.0, scale_grad_by_freq, sparse)
    with plain():
        if operand is None or isinstance(weight, BlockTensor):
            return F.embedding(input, weight, *options)
        if not has_own_scales(operand.format):
            return F.embedding(input, cast_weight(weight, operand, -1), *options)
        return _cast_rows(F.embedding(input, weight, *options), operand)


def embedding_bag(  # noqa: PLR0913, PLR0917
    input: Tensor,  # noqa: A002
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    policy: Policy,
    name: str = "",
) -> Tensor:
    """`torch.nn.functional.embedding_bag` on a table cast along features.

    The whole table is cast, and kept while it does not change. Weights of samples are not cast.

    Args:
        input: integers [N, bag], or [n] with `offsets`.
        weight: [rows, features]; a BlockTensor is used as it is.
        offsets: [N], where each bag begins.
        max_norm: refused: it writes into the table.
        norm_type: of max_norm.
        scale_grad_by_freq: as in torch.
        mode: "sum", "mean" or "max".
        sparse: whether the table's gradient is sparse.
        per_sample_weights: of `input`'s shape, for "sum".
        include_last_offset: whether `offsets` ends with n.
        padding_idx: row that has no part in bags and receives no gradient.
        policy: `storage` is used.
        name: of the module, for ledgers.

    Returns:
        [N, features].

    Raises:
        MicroscaleError: `max_norm` is set.
    """
    if max_norm is not None:
        raise _rescales("embedding_bag", name, max_norm, norm_type)
    operand = policy.storage
    note_product(name, "embedding_bag", (weight, operand), (weight, operand))
    tell_product("table", input, input, weight, operand, -1)
    with plain():
        return F.embedding_bag(
            input,
            cast_right(weight, operand, -1),
            offsets,
            None,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )


def _rescales(kind: str, name: str, max_norm: float, norm_type: float) -> MicroscaleError:
    return MicroscaleError(
        f"{kind} {name!r} has max_norm={max_norm} (norm_type={norm_type}), which rescales "
        "the table while it is read; such tables are not quantized. Leave it out by `ignore`."
    )


def has_own_scales(fmt: BlockFormat) -> bool:
    """Whether no two rows of a table share a scale."""
    shared = fmt.block == "tensor" or isinstance(fmt.block, tuple)
    return not shared and fmt.tensor_scale is None


def _cast_rows(rows: Tensor, operand: Operand) -> Tensor:
    # As a matrix, so that a "channel" is a row here as it is in the table.
    flat = rows.reshape(-1, rows.shape[-1])
    return torch.reshape(cast_operand(flat, operand, -1), rows.shape)
