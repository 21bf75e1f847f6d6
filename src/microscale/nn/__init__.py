"""Layers of `torch.nn` whose products run on cast operands.

`convert` swaps the class of a model's own modules for these and `revert` swaps it back; parameters,
hooks, names and state dicts stay what they are. Each module holds the policy of its place in
`module.microscale` and calls one function of `microscale.functional`.
"""

from microscale.nn.attention import MultiheadAttention
from microscale.nn.bilinear import Bilinear
from microscale.nn.conv import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
)
from microscale.nn.embedding import Embedding, EmbeddingBag
from microscale.nn.linear import Linear
from microscale.nn.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Bilinear",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Embedding",
    "EmbeddingBag",
    "GRUCell",
    "LSTMCell",
    "Linear",
    "MultiheadAttention",
    "RNNCell",
]
