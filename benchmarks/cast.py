"""The reference cast against the memory's speed: python benchmarks/cast.py [--elements N].

`torch.clone` reads and writes every value once, which no cast can undercut. Both run in turns, so
that a change of the machine's speed meets both; medians are compared.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from microscale.cast import cast

FORMATS = ("mxfp8_e4m3", "mxfp6_e2m3", "mxfp4", "mxint8", "nvfp4", "int8-channel")


def seconds(function: Callable[[], object]) -> float:
    """Run once and return the time it took, on the device too."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median time of each function; every round runs all of them once, after a warm-up."""
    rounds = [[seconds(function) for function in functions.values()] for _ in range(repeats + 1)]
    columns = zip(*rounds[1:], strict=True)
    return dict(zip(functions, map(statistics.median, columns), strict=True))


def main() -> None:
    """Print nanoseconds per element, bandwidth, and the ratio to a copy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=2**22)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.elements // 4096, 4096, generator=generator).to(options.device)
    runs: dict[str, Callable[[], object]] = {"clone": x.clone}
    runs |= {fmt: partial(cast, x, fmt) for fmt in FORMATS}
    times = medians(runs, options.repeats)
    print(f"{x.numel()} float32 values, {options.device}, {torch.get_num_threads()} threads")
    print(f"{'':14} {'ns/value':>9} {'GB/s':>7} {'x clone':>8}")
    for name, taken in times.items():
        # One read and one write of four bytes.
        rate = 8 * x.numel() / taken / 1e9
        ratio = taken / times["clone"]
        print(f"{name:14} {taken / x.numel() * 1e9:9.2f} {rate:7.2f} {ratio:8.1f}")


if __name__ == "__main__":
    main()
