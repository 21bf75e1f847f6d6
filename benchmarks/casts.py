"""Casts, packing and unpacking beside the memory's limits: python benchmarks/casts.py.

Everything runs in one process, in turns; medians, and what was disturbed is thrown away. `out` is
memory that is there already; fresh results of many megabytes are bound by page faults. Peers are
torch's own 8-bit casts, and ml_dtypes and torchao where they are installed.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from interleaved import measure
from limits import MOVED, limits, show
from microscale.cast import cast
from microscale.formats import packed_bytes
from microscale.kernels.native.loader import current, native
from microscale.spelling import get_block_format
from microscale.tensor import dequantize, quantize, quantize_both

FORMATS = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8", "nvfp4")
WHOLE = ("int8-token", "int8-channel", "fp8_e4m3-tensor")
Functions = dict[str, tuple[Callable[[], object], float]]
"""What is timed, by name, and how many bytes it moves for each value."""


def _stored(fmt: str) -> float:
    block = get_block_format(fmt)
    return packed_bytes(4096, block.element.bits, 1) / 4096 + block.scale.bits / 8 / 32


def casts(x: Tensor, out: Tensor) -> Functions:
    """Casts of every kind into memory that is there."""
    ours: Functions = {
        f"cast {fmt}, out": (partial(cast, x, fmt, out=out), 8) for fmt in (*FORMATS, *WHOLE)
    }
    mine = x.clone()
    ours["cast mxfp8_e4m3 in place"] = (partial(cast, mine, "mxfp8_e4m3", out=mine), 8)
    ours["cast mxfp8_e4m3, axis 0"] = (partial(cast, x, "mxfp8_e4m3", 0, out=out), 8)
    ours["cast mxfp8_e4m3 stochastic"] = (
        partial(cast, x, "mxfp8_e4m3", rounding="stochastic", seed=1, out=out),
        8,
    )
    ours["cast mxfp8_e4m3, fresh"] = (partial(cast, x, "mxfp8_e4m3"), 8)
    half, half_out = x.bfloat16(), out.bfloat16()
    ours["cast mxfp8_e4m3, bfloat16"] = (partial(cast, half, "mxfp8_e4m3", out=half_out), 4)
    return ours


def packing(x: Tensor) -> Functions:
    """Quantizing to packed parts, and decoding them into memory that is there."""
    wide, half = torch.empty_like(x), torch.empty(x.shape, dtype=torch.bfloat16)
    found: Functions = {}
    for fmt in FORMATS:
        packed = quantize(x, fmt)
        found[f"quantize {fmt}"] = (partial(quantize, x, fmt), 4 + _stored(fmt))
        found[f"dequantize {fmt}"] = (partial(dequantize, packed, out=wide), 4 + _stored(fmt))
        found[f"dequantize {fmt} to bfloat16"] = (
            partial(dequantize, packed, out=half),
            2 + _stored(fmt),
        )
        both = partial(quantize_both, x, fmt)
        found[f"quantize {fmt}, both axes"] = (both, 4 + 2 * _stored(fmt))
        found[f"quantize {fmt}, two calls"] = (partial(_two_calls, x, fmt), 8 + 2 * _stored(fmt))
    return found


def _two_calls(x: Tensor, fmt: str) -> None:
    quantize(x, fmt, -1)
    quantize(x, fmt, -2)


def peers(x: Tensor) -> Functions:
    """What others do about the same thing with."""
    narrow = x.to(torch.float8_e4m3fn)
    found: Functions = {
        "torch to float8_e4m3fn": (partial(x.to, torch.float8_e4m3fn), 5),
        "torch float8_e4m3fn to float32": (narrow.float, 5),
    }
    if find_spec("ml_dtypes"):
        import ml_dtypes

        array = x.numpy()
        for name in ("float8_e4m3fn", "float6_e2m3fn", "float4_e2m1fn"):
            kind = getattr(ml_dtypes, name)
            found[f"ml_dtypes {name} (no scale)"] = (partial(array.astype, kind), 5)
    if find_spec("torchao"):
        from torchao.prototype.mx_formats.mx_tensor import to_mx

        for kind in (torch.float8_e4m3fn,):
            found[f"torchao to_mx {kind}"] = (partial(to_mx, x, kind, 32), 5)
    return found


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=2**24)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    x = torch.randn(options.values // 4096, 4096)
    out = torch.empty_like(x)
    functions: Functions = {name: (f, MOVED[name]) for name, f in limits(x, out).items()}
    functions |= casts(x, out) | packing(x) | (peers(x) if options.peers else {})
    times = measure({name: f for name, (f, _) in functions.items()}, options.repeats)
    found = native()
    kernels = current(found.library) if found.library else f"reference: {found.reason}"
    print(f"{x.numel()} float32 values, {torch.get_num_threads()} threads, kernels {kernels}")
    for name, timing in times.items():
        print(show(name, timing, x.numel(), functions[name][1], times["copy_"].median))
    small = _overhead(options.repeats)
    if options.json:
        table = {name: timing.to_dict() for name, timing in times.items()} | small
        options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def _overhead(repeats: int) -> dict[str, dict[str, float]]:
    """The time of a call that has almost nothing to do."""
    x = torch.randn(4, 32)
    out = torch.empty_like(x)
    functions: dict[str, Callable[[], object]] = {
        "cast of 128 values": partial(cast, x, "mxfp4"),
        "cast of 128 values, out": partial(cast, x, "mxfp4", out=out),
        "x + 1 of 128 values": partial(x.add, 1),
        "quantize of 128 values": partial(quantize, x, "mxfp4"),
    }
    times = measure(functions, repeats)
    for name, timing in times.items():
        print(f"{name:34} {timing.median * 1e6:9.2f} us")
    return {name: timing.to_dict() for name, timing in times.items()}


if __name__ == "__main__":
    main()
