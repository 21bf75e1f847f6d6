"""Tensors to cast and pack, and comparison by bits."""

import math

import torch
from torch import Tensor

from oracle_arrays import assert_same, to_numpy

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    powers = torch.randint(-6, 7, shape, generator=generator, dtype=torch.float64)
    return (values * torch.exp2(powers)).to(dtype)


def awkward() -> Tensor:
    """A matrix with NaN, infinities, zeros, float32 subnormals, the top of float32."""
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 2.0**-149, -(2.0**-127), 3.4028234e38]
    x = sample((12, 18), seed=11)
    x[1:9, 3] = torch.tensor(special)
    x[9] = torch.tensor([2.0**-149, -(2.0**-130), 0.0] * 6)
    x[10] = math.inf
    x[11] = -0.0
    return x


def integers(shape: tuple[int, ...], most: int, seed: int = 0) -> Tensor:
    """Small whole numbers: float32 adds their products exactly, in whatever order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).float()


def same(a: Tensor, b: Tensor) -> None:
    """Assert equal types and equal bits."""
    assert a.dtype == b.dtype
    assert_same(a, to_numpy(b))
