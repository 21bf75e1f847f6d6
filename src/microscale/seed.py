"""Where the random bits of stochastic rounding come from."""

import torch
from torch import Tensor

from microscale.errors import MicroscaleError
from microscale.rounding import Rounding

Seed = int | Tensor | None
"""An integer; or int64 [3] (seed, call, operand) or [4] (and offset); or None for torch's own."""


def seed_tensor(seed: Seed, rounding: str) -> Tensor | None:
    """The key of one cast as int64 [4]: seed, call, operand, index of the first element.

    None draws a seed from PyTorch's generator, so that `torch.manual_seed` repeats a run, calls are
    independent of each other, and recomputation under activation checkpointing gets the same bits.
    A tensor is taken as it is: a compiled training step advances its call number in place.

    Raises MicroscaleError for a seed beside another rounding, and for tensors of other shapes.
    """
    if rounding != Rounding.STOCHASTIC.value:
        if seed is not None:
            raise MicroscaleError(
                f"seed={seed!r} with rounding={rounding!r}: "
                "only rounding='stochastic' takes a seed."
            )
        return None
    if seed is None:
        drawn = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
        return torch.nn.functional.pad(drawn, (0, 3))
    if isinstance(seed, Tensor):
        if seed.dtype is not torch.int64 or seed.dim() != 1 or seed.numel() not in (3, 4):
            raise MicroscaleError(
                f"seed is {seed.dtype} of shape {tuple(seed.shape)}; it must be int64 of shape [3] "
                "(seed, call, operand) or [4] (and the index of the first element)."
            )
        return torch.nn.functional.pad(seed, (0, 4 - seed.numel()))
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise MicroscaleError(f"seed={seed!r} is not an integer of 64 bits or a tensor.")
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed, 0, 0, 0])
