"""Seconds to round one layer's weights: python benchmarks/solve.py [--size K] [--outputs N].

Beside each method stands what its large matrix products alone take at the speed of one float64
product of the same size on this machine: no blocked solver of this form can be faster. Statistics
stand beside the product that the layer itself is, for as many samples.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from microscale.operands import Operand
from microscale.recipes.grid import Grid
from microscale.recipes.solve import Solver, solve
from microscale.recipes.statistics import Statistics
from microscale.spelling import get_block_format

# Multiplications of large products in units of K^2 N (substitutions, targets, sweeps) and of K^3
# (a Cholesky factor is a third, a triangular inverse another). The number is that of sweeps.
WORK: dict[str, tuple[Solver, float, float]] = {
    "rtn": (Solver("rtn"), 0.0, 0.0),
    "error_diffusion-0": (Solver("error_diffusion", sweeps=0), 1.5, 0.0),
    "error_diffusion-1": (Solver("error_diffusion", sweeps=1), 4.5, 0.0),
    "error_diffusion": (Solver("error_diffusion"), 7.5, 0.0),
    "gptq": (Solver("gptq"), 0.5, 2 / 3),
    "qronos": (Solver("qronos"), 2.5, 2 / 3),
}


def seconds(function: Callable[[], object]) -> float:
    """Run once and return the time it took."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def multiplications(size: int, dtype: torch.dtype) -> float:
    """Multiplications a second in a product of square matrices."""
    a, b = torch.randn(2, size, size, dtype=dtype)
    torch.mm(a, b)
    return size**3 / min(seconds(lambda: torch.mm(a, b)) for _ in range(2))


def problem(size: int, samples: int) -> tuple[Tensor, Tensor]:
    """Correlated inputs and a perturbed copy of them, [1, samples, size]."""
    wide = torch.randn(1, samples, size) + torch.randn(1, samples, 1)
    return wide + 0.05 * torch.randn_like(wide), wide


def main() -> None:
    """Print times, limits and errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=0, help="N; by default K")
    parser.add_argument("--format", default="mxfp4")
    parser.add_argument("--methods", default=",".join(WORK))
    options = parser.parse_args()
    K, samples = options.size, options.size + options.size // 2
    N = options.outputs or K
    torch.manual_seed(0)
    quantized, wide = problem(K, samples)
    W = torch.randn(1, K, N)
    rate = multiplications(2048, torch.float64)
    print(f"{torch.get_num_threads()} threads, float64 products: {rate / 1e9:.1f} G mult/s")
    statistics = Statistics.empty(1, K)
    gathering = seconds(lambda: statistics.add(quantized, wide))
    forward = seconds(lambda: (wide[0] @ W[0], quantized[0] @ W[0]))
    print(f"statistics of {samples} samples {gathering:.2f} s, two products {forward:.2f} s")
    grid = Grid.of(W, Operand(get_block_format(options.format)), "mse")
    block = grid.format.block
    segments = [block] * (K // block) if isinstance(block, int) else [K]
    for name in options.methods.split(","):
        solver, square, cube = WORK[name]
        start = time.perf_counter()
        found = solve(W, statistics, grid, segments, solver)
        took = time.perf_counter() - start
        limit = (square * K * K * N + cube * K**3) / rate
        lost = statistics.lost(W, found.values) / statistics.energy(W)
        print(f"{name:18} {took:7.2f} s, GEMM-bound limit {limit:6.2f} s, error {lost:.3e}")


if __name__ == "__main__":
    main()
