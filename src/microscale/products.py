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
    **_found(torch, "matmul mm bmm addmm baddbmm conv1d conv2d conv3d"),
    **_found(torch, "conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_found(torch, "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"),
    **_found(torch, "mv addmv dot vdot inner einsum tensordot addbmm"),
    **_found(torch.linalg, "matmul"),
    **_found(torch, "_grouped_mm"),
    **_found(F, "grouped_mm"),
    **_found(Tensor, "mv addmv addmv_ dot vdot inner addbmm addbmm_"),
    **_found(Tensor, "matmul mm bmm addmm addmm_ baddbmm baddbmm_ __matmul__"),
    Tensor.__rmatmul__: "matmul",
    **_found(F, "linear bilinear embedding embedding_bag"),
    **_found(F, "scaled_dot_product_attention multi_head_attention_forward"),
}
"""Products that are quantized where a policy says so."""

LEFT: dict[Function, str] = {
    **_found(torch, "chain_matmul cdist embedding"),
    **_found(torch, "conv_tbc convolution"),
    **_found(torch, "_scaled_mm _scaled_grouped_mm smm sspaddmm hspmm"),
    **_found(torch, "_native_multi_head_attention _transformer_encoder_layer_fwd"),
    **_found(torch.linalg, "multi_dot vecdot"),
    **_found(torch.sparse, "mm addmm"),
    **_found(Tensor, "smm sspaddmm"),
    **_found(F, "scaled_grouped_mm linear_cross_entropy"),
    **_found(torch.ops.aten, "mm bmm addmm baddbmm matmul linear convolution embedding"),
}
"""Products that this version leaves in the wider type, and says so."""

PRODUCTS: dict[Function, str] = QUANTIZED | LEFT

_NORMS = "layer_norm rms_norm group_norm batch_norm instance_norm local_response_norm normalize"
_ACTIVATIONS = (
    "relu relu_ relu6 leaky_relu leaky_relu_ prelu rrelu rrelu_ elu elu_ selu selu_ celu celu_ "
    "gelu silu mish hardswish hardsigmoid hardtanh hardtanh_ hardshrink softshrink tanhshrink "
    "softplus softsign softmin sigmoid sigmoid_ logsigmoid tanh tanh_ glu threshold threshold_"
)

ADDS: dict[Function, str] = _found(torch, "add") | _found(
    Tensor, "add add_ __add__ __radd__ __iadd__"
)
"""Sums, which are residual where both terms are floating tensors."""

VECTOR: dict[Function, str] = ADDS | {
    function: name
    for owner in (torch, F, Tensor)
    for function, name in _found(owner, f"softmax log_softmax {_NORMS} {_ACTIVATIONS}").items()
}
"""Vector operations whose results are rounded where a policy says so."""
