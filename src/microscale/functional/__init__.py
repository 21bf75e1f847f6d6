"""Products on cast operands: the functions of `torch.nn.functional` that multiply, with a policy.

Each operand is cast along the reduction axis of its product and multiplied by PyTorch in the wider
type. Gradients pass the casts straight through. `policy` is that of one module
(`Policy.at(name)`), and `name` is how a ledger lists the product.
"""

from microscale.functional.attention import scaled_dot_product_attention
from microscale.functional.bilinear import bilinear
from microscale.functional.contraction import addbmm, einsum, inner, tensordot
from microscale.functional.conv import conv1d, conv2d, conv3d
from microscale.functional.conv_transpose import (
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from microscale.functional.embedding import embedding, embedding_bag
from microscale.functional.linear import addmm, linear, matmul
from microscale.functional.multihead import Projections, multi_head_attention
from microscale.functional.recurrent import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell

__all__ = [
    "Projections",
    "addbmm",
    "addmm",
    "bilinear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "einsum",
    "embedding",
    "embedding_bag",
    "gru",
    "gru_cell",
    "inner",
    "linear",
    "lstm",
    "lstm_cell",
    "matmul",
    "multi_head_attention",
    "rnn",
    "rnn_cell",
    "scaled_dot_product_attention",
    "tensordot",
]
