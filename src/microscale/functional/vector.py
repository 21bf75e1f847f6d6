"""What products and vector operations deliver: their results, rounded as a policy's `vector` says.

A model in float32 computes in float32, and every result that a chip would write as bfloat16 is
rounded to one, once, and kept in the model's own type.
"""

import torch
from torch import Tensor

from microscale.kernels.reference import narrow, preround
from microscale.policy import Policy
from microscale.rounding import Rounding
from microscale.weights import is_uncast


def deliver(x: Tensor, policy: Policy) -> Tensor:
    """Round float32 and float64 values to those of `policy.vector`, straight-through.

    Finite values beyond its largest become the largest, so that a mask of the smallest float32
    stays finite. Other types are as they are: bfloat16 has nothing to round, float16 less range.
    """
    if not _rounds(x, policy):
        return x
    rounded = _round(x.detach(), policy.vector)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return rounded
    # Taking away +0 changes no value, not even -0, and has the gradient of x.
    return rounded - torch.where(x.isfinite(), x.detach() - x, 0.0)


def deliver_in_place(x: Tensor, policy: Policy) -> Tensor:
    """Round what an in-place function has written, behind autograd's back."""
    if _rounds(x, policy):
        x.data.copy_(_round(x.detach(), policy.vector))
    return x


def _rounds(x: Tensor, policy: Policy) -> bool:
    return (
        policy.vector != "float32" and x.dtype in (torch.float32, torch.float64) and not is_uncast()
    )


def _round(x: Tensor, vector: str) -> Tensor:
    largest = torch.finfo(torch.bfloat16).max
    if vector == "bfloat16_away":
        rounded = preround(x, Rounding.AWAY)
    else:
        rounded = narrow(x, torch.bfloat16).to(x.dtype)
    return torch.where(x.isinf(), x, rounded.clamp(-largest, largest))
