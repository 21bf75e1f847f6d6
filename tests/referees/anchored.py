"""Single elements through `cast`: each value beside an anchor that keeps the scale at one."""

import numpy as np
import torch

from microscale.cast import cast
from microscale.formats import E8M0, BlockFormat, ElementFormat
from oracle_arrays import Floats, all_halves, to_numpy


def binade(element: ElementFormat) -> float:
    """The power of two above the largest value; below it, the scale stays one."""
    return float(2.0 ** (element.emax + 1))


def cast_elements(
    x: torch.Tensor, element: ElementFormat, rounding: str = "even", overflow: str = "saturate"
) -> Floats:
    """Element values of a vector of magnitudes below `binade(element)`."""
    rows = torch.stack([x, torch.full_like(x, 2.0**element.emax)], dim=1)
    fmt = BlockFormat(element, E8M0, 32)
    return to_numpy(cast(rows, fmt, rounding=rounding, overflow=overflow)[:, 0])


def inputs(element: ElementFormat, dtype: torch.dtype) -> torch.Tensor:
    """All halves, or a hundred thousand float32 values, that lie below the binade."""
    if dtype is torch.float32:
        values = _float32_sample(element)
    else:
        values = all_halves(str(dtype).removeprefix("torch."))
    return values[values.abs() < binade(element)]


def _float32_sample(element: ElementFormat) -> torch.Tensor:
    """Random bit patterns, random magnitudes in range, every midpoint and the floats beside it."""
    draw = np.random.default_rng(0)
    patterns = draw.integers(0, 2**32, 50_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    spread = draw.uniform(-1, 1, 50_000) * 2.0 ** draw.uniform(-12, element.emax + 1, 50_000)
    finite = sorted({abs(v) for v in element.values if np.isfinite(v)})
    middles = (np.array(finite[:-1]) + np.array(finite[1:])).astype(np.float32) / 2
    beside = [np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf))]
    grid = np.concatenate([np.array(finite, np.float32), middles, *beside])
    parts = [patterns, spread.astype(np.float32), grid, -grid]
    values = np.concatenate(parts)
    return torch.from_numpy(values[np.isfinite(values)])
