"""The algorithm in plain PyTorch: scale, round, encode, pack. The specification of all kernels.

Range: float64 input is computed in float64, everything else in float32. Dividing by a power of two
only loses bits of values far below half the smallest element, which round to zero either way; so
power-of-two scales are exact.

Cost: about a dozen passes over the data. The steps stay apart here, because the C++ and Triton
kernels are read beside them.
"""

from microscale.kernels.reference.blocks import (
    gather_shared,
    merge,
    split,
    spread_shared,
    widen,
    working,
)
from microscale.kernels.reference.casts import (
    cast,
    dequantize,
    in_range,
    limits,
    quantize,
    store,
)
from microscale.kernels.reference.codes import (
    decode,
    decode_scale,
    encode,
    encode_scale,
    pack,
    unpack,
)
from microscale.kernels.reference.elements import (
    Scales,
    random_like,
    rounded,
    times,
)
from microscale.kernels.reference.numbers import (
    grid_spacing,
    narrow,
    power_of_two,
    preround,
    round_to_grid,
    round_to_integer,
    whole_range,
)
from microscale.kernels.reference.scales import (
    scale,
    tensor_scale,
)

__all__ = [
    "Scales",
    "cast",
    "decode",
    "decode_scale",
    "dequantize",
    "encode",
    "encode_scale",
    "gather_shared",
    "grid_spacing",
    "in_range",
    "limits",
    "merge",
    "narrow",
    "pack",
    "power_of_two",
    "preround",
    "quantize",
    "random_like",
    "round_to_grid",
    "round_to_integer",
    "rounded",
    "scale",
    "split",
    "spread_shared",
    "store",
    "tensor_scale",
    "times",
    "unpack",
    "whole_range",
    "widen",
    "working",
]
