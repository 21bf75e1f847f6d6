"""What other programs do about the same: torchao, gfloat, microxcaling, ggml, and plain memcpy.

`missing()` says which are not measured, and why.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ggml
from casts import Functions
from products import COLD, dense

MICROXCALING = "MICROSCALE_MICROXCALING"
PART = 2**15
"""Values for what takes a second for 64 MB."""
WEIGHT_BITS = {"int8": 8, "mxfp8": 8.25, "mxfp4": 4.25, "q8_0": 8.5}
"""Bits a weight, by a word in the name of a row."""

Runs = dict[str, Callable[[], object]]


def memmove(x: Tensor, y: Tensor) -> None:
    """Copy by the C library, one thread."""
    ctypes.memmove(y.data_ptr(), x.data_ptr(), x.nbytes)


def casts(x: Tensor) -> Functions:
    """Casts of other formats than casts.py has, and there and back."""
    if not find_spec("torchao"):
        return {}
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    found: Functions = {}
    for kind in (torch.float8_e4m3fn, torch.float4_e2m1fn_x2):
        packed = MXTensor.to_mx(x, kind, 32)
        found[f"torchao {kind} dequantize"] = (partial(packed.dequantize, torch.float32), 5)
    found["torchao to_mx float4_e2m1"] = (
        partial(MXTensor.to_mx, x, torch.float4_e2m1fn_x2, 32), 4.5
    )  # fmt: skip
    return found


def casts_of_parts(x: Tensor) -> Functions:
    """Casts that are too slow for a large tensor: PART values."""
    part = x.flatten()[:PART].view(-1, 256).clone()
    found: Functions = {}
    if find_spec("gfloat"):
        import gfloat
        from gfloat import formats

        array = part.double().numpy()
        rounding = partial(gfloat.round_ndarray, formats.format_info_ocp_e4m3, array, sat=True)
        found["gfloat round_ndarray e4m3 (no scale)"] = (rounding, 5)
    if not isinstance(mx := microxcaling(), str):
        for fmt in ("fp8_e4m3", "fp6_e2m3", "fp4_e2m1", "int8"):
            found[f"microxcaling {fmt}"] = (partial(mx, part, fmt), 8)
    return found


@lru_cache(maxsize=1)
def microxcaling() -> Callable[[Tensor, str], Tensor] | str:
    """Its cast in PyTorch along the last axis, or why there is none."""
    path = os.environ.get(MICROXCALING)
    if not path:
        return f"not given: set {MICROXCALING} to the path of a checkout"
    sys.path.append(path)
    try:
        from mx.mx_ops import quantize_mx_op
        from mx.specs import finalize_mx_specs
    except ImportError as error:
        return f"{MICROXCALING}={path}: {error}"
    settings = finalize_mx_specs(
        {"scale_bits": 8, "w_elem_format": "fp8_e4m3", "block_size": 32, "custom_cuda": False}
    )

    def run(x: Tensor, fmt: str) -> Tensor:
        found: Tensor = quantize_mx_op(x, settings, elem_format=fmt, axes=[-1])
        return found

    return run


def products(values: Tensor, x: Tensor) -> Runs:
    """Products with weights packed by others, and in float32."""
    wide, given = dense(values.float()), x.float()
    found: Runs = {"torch float32 linear": lambda: F.linear(given, next(wide))}
    if not isinstance(library := _ggml(), str):
        found |= dict(ggml.products(library, values, x, COLD))
    if find_spec("torchao"):
        found |= _torchao_products(values, x)
    return found


def _torchao_products(values: Tensor, x: Tensor) -> Runs:
    """MX runs on the CPU only as torchao's emulation, which casts the activations too."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from torchao.quantization.quantize_.common import KernelPreference

    kind, emulated = torch.float8_e4m3fn, KernelPreference.EMULATED
    activation = QuantizeTensorToMXKwargs(
        elem_dtype=kind, block_size=32, kernel_preference=emulated
    )  # fmt: skip
    held = MXTensor.to_mx(values, kind, 32, kernel_preference=emulated, act_quant_kwargs=activation)
    layer = nn.Linear(values.shape[1], values.shape[0], bias=False, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(values, requires_grad=False)
    quantize_(layer, Int8WeightOnlyConfig(version=2))
    weights = cycle([layer.weight.clone() for _ in range(max(2, COLD // values.numel()))])
    return {
        "torchao int8 weight-only": lambda: F.linear(x, next(weights)),
        "torchao mxfp8_e4m3 (emulated)": partial(F.linear, x, held),
    }


@lru_cache(maxsize=1)
def _ggml() -> ggml.Ggml | str:
    return ggml.load()


def missing() -> dict[str, str]:
    """Which peers are not measured, and why."""
    found = {
        name: "not installed" for name in ("torchao", "ml_dtypes", "gfloat") if not find_spec(name)
    }
    if find_spec("torchao"):
        found["torchao compiled"] = "torch.compile on the CPU knows no float8_e8m0fnu"
    given = {"microxcaling": microxcaling(), "ggml": _ggml()}
    return found | {name: why for name, why in given.items() if isinstance(why, str)}
