"""An emulated linear layer against PyTorch's: forward, and forward and backward.

Every operand is cast along the reduction axis of its own product. The weight counts as changed in
every step, as in training; forward alone, its cast is kept. Run as `python benchmarks/layers.py`.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interleaved import Timing, measure
from microscale.functional import linear
from microscale.kernels.native.loader import current, native
from microscale.policy import Policy

FORMATS = ("mxfp8_e4m3", "mxfp4", "mxint8", "nvfp4")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Layer = Callable[[Tensor, Tensor], Tensor]


def forward(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """The product alone."""
    with torch.no_grad():
        return layer(x, weight)


def step(layer: Layer, x: Tensor, weight: Tensor, grad: Tensor) -> None:
    """The product and both gradients."""
    x.grad = weight.grad = None
    layer(x, weight).backward(grad)


def functions(
    sizes: tuple[int, int, int], formats: list[str], rounding: str
) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    batch, inside, outside = sizes
    found: dict[str, Callable[[], object]] = {}
    for name, dtype in TYPES.items():
        x = torch.randn(batch, inside).to(dtype).requires_grad_()
        values = (torch.randn(outside, inside) / inside**0.5).to(dtype)
        grad = torch.randn(batch, outside).to(dtype)
        layers: dict[str, Layer] = {"torch": F.linear}
        for fmt in formats:
            policy = Policy.of(fmt, fmt, fmt, rounding=rounding)
            layers[fmt] = partial(linear, policy=policy)
        for title, layer in layers.items():
            # A step has the kept cast of its weight forgotten.
            weight, trained = nn.Parameter(values), nn.Parameter(values.clone())
            found[f"forward, {name}, {title}"] = partial(forward, layer, x, weight)
            found[f"step, {name}, {title}"] = partial(step, layer, x, trained, grad)
    return found


def table(times: dict[str, Timing]) -> None:
    """Print times, and their ratio to PyTorch's in bfloat16."""
    print(f"{'':34}{'ms':>9}{'low':>9}{'high':>9}{'/ torch bfloat16':>18}  kept")
    for name, timing in sorted(times.items()):
        peer = times[f"{name.partition(',')[0]}, bfloat16, torch"]
        line = "".join(f"{1e3 * t:9.2f}" for t in (timing.median, timing.low, timing.high))
        print(f"{name:34}{line}{timing.median / peer.median:18.2f}  {timing.kept}")


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--sizes", nargs=3, type=int, default=[512, 2048, 2048])
    parser.add_argument("--rounding", default="even")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = native()
    kernels = current(found.library) if found.library else f"reference: {found.reason}"
    print(f"{torch.get_num_threads()} threads, kernels {kernels}, torch {torch.__version__}")
    batch, inside, outside = options.sizes
    print(f"batch {batch}, {inside} in, {outside} out, rounding {options.rounding}")
    todo = functions((batch, inside, outside), options.formats, options.rounding)
    times = measure(todo, options.repeats)
    table(times)
    if options.json:
        data = {name: timing.to_dict() for name, timing in times.items()}
        options.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
