"""What the memory of this machine allows, by torch's own copies: python benchmarks/limits.py.

Bandwidth counts every byte read and written. `copy_` into memory that is there, `clone` into memory
that is new (bound by page faults for large tensors), `sum` as a pure read, `mul_` as reading and
writing in place.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from interleaved import Timing, measure

SIZES = (2**17, 2**22, 2**24)
"""Values of float32: within the second cache, within the third, beyond it on most machines."""


def limits(x: Tensor, out: Tensor) -> dict[str, Callable[[], object]]:
    """The operations that casts are compared with."""
    half = torch.empty(x.shape, dtype=torch.bfloat16)
    ones = torch.ones_like(x)
    return {
        "copy_": lambda: out.copy_(x),
        "clone": x.clone,
        "read (sum)": x.sum,
        "in place (mul_)": lambda: ones.mul_(1.0),
        "copy_ to bfloat16": lambda: half.copy_(x),
    }


MOVED = {"copy_": 8, "clone": 8, "read (sum)": 4, "in place (mul_)": 8, "copy_ to bfloat16": 6}
"""Bytes per value."""


def show(name: str, timing: Timing, values: int, moved: float, reference: float) -> str:
    """One line: milliseconds, spread, bandwidth, time over that of `copy_`."""
    rate = moved * values / timing.median / 1e9
    return (
        f"{name:34} {timing.median * 1e3:9.4f} ms  {timing.low * 1e3:9.4f} to "
        f"{timing.high * 1e3:9.4f}  {rate:6.1f} GB/s  {timing.median / reference:6.2f} x copy_"
        f"{'' if timing.kept else '  (all disturbed)'}"
    )


def main() -> None:
    """Print the limits for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    for values in SIZES:
        x = torch.randn(values)
        functions = limits(x, torch.empty_like(x))
        times = measure(functions, options.repeats)
        print(f"{values} float32 values, {torch.get_num_threads()} threads")
        for name, timing in times.items():
            print(show(name, timing, values, MOVED[name], times["copy_"].median))


if __name__ == "__main__":
    main()
