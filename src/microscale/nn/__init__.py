"""Layers of `torch.nn` whose products run on cast operands.

`convert` swaps the class of a model's own modules for these and `revert` swaps it back; parameters,
hooks, names and state dicts stay what they are. Each module holds the policy of its place in
`module.microscale` and calls one function of `microscale.functional`.
"""

from microscale.nn.attention import MultiheadAttention
from microscale.nn.conv import Conv1d, Conv2d
from microscale.nn.embedding import Embedding
from microscale.nn.linear import Linear
from microscale.nn.recurrent import LSTM

__all__ = ["LSTM", "Conv1d", "Conv2d", "Embedding", "Linear", "MultiheadAttention"]
