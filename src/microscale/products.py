"""The functions of PyTorch that multiply and sum: what a ledger and a scope look out for.

A function that is not here is taken for a vector operation and is not quantized or recorded.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Any]


def _found(owner: object, names: str) -> dict[Function, str]:
    """The functions of these names that this version of PyTorch has, each with its name."""
    return {getattr(owner, n): n.strip("_") for n in names.split() if hasattr(owner, n)}


QUANTIZED: dict[Function, str] = {
    **_found(torch, "matmul mm bmm addmm baddbmm conv1d conv2d"),
    **_found(torch.linalg, "matmul"),
    **_found(Tensor, "matmul mm bmm addmm addmm_ baddbmm baddbmm_ __matmul__"),
    Tensor.__rmatmul__: "matmul",
    **_found(F, "linear embedding scaled_dot_product_attention multi_head_attention_forward"),
}
"""Products that are quantized where a policy says so."""

LEFT: dict[Function, str] = {
    **_found(torch, "mv addmv addbmm dot vdot inner einsum tensordot chain_matmul cdist embedding"),
    **_found(
        torch, "conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc convolution"
    ),
    **_found(torch, "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"),
    **_found(torch, "_grouped_mm _scaled_mm _scaled_grouped_mm smm sspaddmm hspmm"),
    **_found(torch, "_native_multi_head_attention _transformer_encoder_layer_fwd"),
    **_found(torch.linalg, "multi_dot vecdot"),
    **_found(torch.sparse, "mm addmm"),
    **_found(Tensor, "mv addmv addmv_ addbmm addbmm_ dot vdot inner smm sspaddmm"),
    **_found(F, "bilinear embedding_bag grouped_mm scaled_grouped_mm linear_cross_entropy"),
    **_found(torch.ops.aten, "mm bmm addmm baddbmm matmul linear convolution embedding"),
}
"""Products that this version leaves in the wider type, and says so."""

PRODUCTS: dict[Function, str] = QUANTIZED | LEFT
