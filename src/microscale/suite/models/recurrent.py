"""Weights of recurrent layers as checkpoints store them, brought into PyTorch's arrangement."""

from collections.abc import Mapping

import torch
from torch import Tensor


def lstm_state(
    suffix: str, weight: Tensor, bias: Tensor, inputs: int, order: str = "ifgo"
) -> Mapping[str, Tensor]:
    """The parameters of one direction of an `nn.LSTM` layer, by their names there.

    Args:
        suffix: of the names, such as "l0" or "l1_reverse".
        weight: [4 hidden, inputs + hidden], of the input and the hidden state side by side.
        bias: [4 hidden].
        inputs: number of input features.
        order: the gates as `weight` has them: input i, forget f, candidate g, output o.
    """
    weight, bias = (_in_order(tensor, order) for tensor in (weight, bias))
    return {
        f"weight_ih_{suffix}": weight[:, :inputs].contiguous(),
        f"weight_hh_{suffix}": weight[:, inputs:].contiguous(),
        f"bias_ih_{suffix}": bias,
        f"bias_hh_{suffix}": torch.zeros_like(bias),
    }


def _in_order(tensor: Tensor, order: str) -> Tensor:
    gates = dict(zip(order, tensor.chunk(4), strict=True))
    return torch.cat([gates[gate] for gate in "ifgo"])
