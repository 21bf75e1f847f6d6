"""Products on cast operands: the functions of `torch.nn.functional` that multiply, with a policy.

Each operand is cast along the reduction axis of its product and multiplied by PyTorch in the wider
type. Gradients pass the casts straight through. `policy` is that of one module
(`Policy.at(name)`), and `name` is how a ledger lists the product.
"""

from microscale.functional.attention import scaled_dot_product_attention
from microscale.functional.conv import conv1d, conv2d
from microscale.functional.embedding import embedding
from microscale.functional.linear import addmm, linear, matmul
from microscale.functional.multihead import Projections, multi_head_attention
from microscale.functional.recurrent import lstm

__all__ = [
    "Projections",
    "addmm",
    "conv1d",
    "conv2d",
    "embedding",
    "linear",
    "lstm",
    "matmul",
    "multi_head_attention",
    "scaled_dot_product_attention",
]
