"""compressed-tensors, which vLLM and transformers load.

Linear layers alone: `weight_packed` and `weight_scale` beside each other, or `weight` where codes
fill bytes. The scales of MX are E8M0 bytes. NVFP4's outer scale is stored as its reciprocal and
divided by, so only powers of two come back exactly. Integers have float32 scales.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from microscale.checkpoint.layouts.base import (
    Content,
    Found,
    Item,
    Parts,
    as_type,
    base_name,
    is_weight,
    model_dtype,
    not_along_last,
    outline,
    put_together,
    refuse_nan,
)
from microscale.errors import MicroscaleError
from microscale.tensor import BlockTensor

MX = {
    "mxfp4": ("mxfp4-pack-quantized", 4),
    "mxfp6_e2m3": ("mxfp6-pack-quantized", 6),
    "mxfp8_e4m3": ("mxfp8-quantized", 8),
}
KINDS = {**MX, "nvfp4": ("nvfp4-pack-quantized", 4), "int8-channel": ("int-quantized", 8)}
INT4 = "pack-quantized"


class CompressedTensors:
    """The layout."""

    name = "compressed-tensors"

    def refusal(self, item: Item) -> str:
        """Why a packed tensor cannot be carried, or ""."""
        if _TABLE_NAMES & set(item.name.split(".")):
            return "carries linear layers, not tables"
        int4 = ("int4-channel", "int4-token", "int4-32-fp32", "int4-64-fp32", "int4-128-fp32")
        return is_weight(item) or not_along_last(item, *KINDS, "int8-token", *int4)

    def encode(self, name: str, q: BlockTensor) -> dict[str, Tensor]:
        """The stored tensors of a weight."""
        fmt = base_name(outline(str(q.format), tuple(q.shape), q.dtype))
        if fmt in MX:
            refuse_nan(name, q, self.name)
            codes = as_type(q.codes, torch.float8_e4m3fn) if fmt == "mxfp8_e4m3" else q.codes
            own = name if fmt == "mxfp8_e4m3" else f"{name}_packed"
            return {own: codes, f"{name}_scale": q.scales}
        if fmt == "nvfp4":
            return {
                f"{name}_packed": q.codes,
                f"{name}_scale": as_type(q.scales, torch.float8_e4m3fn),
                f"{name}_global_scale": _reciprocal(name, q),
            }
        # Our integers are k / 2^(bits - 2); theirs k.
        scales = q.scales.float() * 2.0 ** (2 - q.format.element.bits)
        if not scales.is_meta and not torch.equal(
            scales * 2.0 ** (q.format.element.bits - 2), q.scales
        ):
            raise MicroscaleError(f"tensor {name!r} has scales too small for {self.name}.")
        if q.format.element.bits == 8:
            return {name: as_type(q.codes, torch.int8), f"{name}_scale": scales}
        # Codes are offset by 8, eight to an int32, the lowest first; both orders are little-endian.
        packed = as_type(q.codes ^ 0x88, torch.int32)
        return {
            f"{name}_packed": packed,
            f"{name}_scale": scales,
            f"{name}_shape": torch.tensor(q.shape, device=q.codes.device),
        }

    def find(self, parts: Parts, config: Mapping[str, Any]) -> Iterator[tuple[str, Found]]:
        """The packed weights."""
        dtype = model_dtype(config)
        for stored, scale in parts.items():
            if not stored.endswith(".weight_scale"):
                continue
            name = stored.removesuffix("_scale")
            packed, shape = parts.get(f"{name}_packed"), parts.get(f"{name}_shape")
            outer = f"{name}_global_scale"
            if packed is None and name in parts:
                yield name, _bytes_wide(name, parts, dtype)
            elif packed is not None and shape is not None:
                yield name, _int4(name, packed.shape, scale.shape, dtype)
            elif packed is not None:
                yield name, _packed(name, packed.shape, scale.shape, dtype, outer in parts)

    def describe(
        self,
        content: Content,  # noqa: ARG002
        carried: Mapping[str, Item],
    ) -> dict[str, dict[str, Any]]:
        """config.json's quantization_config: a group for each format, by the names of modules."""
        groups: dict[str, list[str]] = {}
        for name, item in carried.items():
            assert item.packed is not None
            groups.setdefault(base_name(item.packed), []).append(name.removesuffix(".weight"))
        found = {
            f"group_{n}": {
                "targets": targets,
                "format": _format(fmt),
                "weights": _weights(fmt),
                "input_activations": None,
                "output_activations": None,
            }
            for n, (fmt, targets) in enumerate(groups.items())
        }
        formats = {group["format"] for group in found.values()}
        quantization = {
            "quant_method": self.name,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": found,
            "ignore": [],
            "kv_cache_scheme": None,
        }
        return {"config.json": {"quantization_config": quantization}}


_TABLE_NAMES = {"embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "shared"}


def _format(fmt: str) -> str:
    return KINDS[fmt][0] if fmt in KINDS else "int-quantized" if fmt.startswith("int8") else INT4


def _weights(fmt: str) -> dict[str, Any]:
    base: dict[str, Any] = {"symmetric": True, "dynamic": False}
    if fmt.startswith("int"):
        bits, block = int(fmt[3]), fmt.split("-")[1]
        group = int(block) if block.isdigit() else None
        strategy = "group" if group else "channel"
        return base | {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": group}
    base |= {"num_bits": KINDS[fmt][1], "type": "float"}
    if fmt == "nvfp4":
        scale = "torch.float8_e4m3fn"
        return base | {"strategy": "tensor_group", "group_size": 16, "scale_dtype": scale}
    scales = {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    return base | {"strategy": "group", "group_size": 32, **scales}


def _reciprocal(name: str, q: BlockTensor) -> Tensor:
    divisor = 1.0 / q.tensor_scale
    if not q.codes.is_meta and torch.frexp(q.tensor_scale)[0].abs().item() != 0.5:
        raise MicroscaleError(
            f"tensor {name!r} has the tensor scale {q.tensor_scale.item()!r}; compressed-tensors "
            "divides by its reciprocal, which gives other values unless it is a power of two. "
            "Export to modelopt, which multiplies."
        )
    return divisor


def _bytes_wide(name: str, parts: Parts, dtype: torch.dtype) -> Found:
    weight, scale = parts[name], parts[f"{name}_scale"]
    names = (name, f"{name}_scale")
    if weight.entry.tag == "F8_E4M3" and scale.entry.tag == "U8":
        packed = outline("mxfp8_e4m3", weight.shape, dtype)
        return Found(packed, names, lambda w, s: put_together(packed, w.view(torch.uint8), s))
    if weight.entry.tag != "I8":
        raise MicroscaleError(
            f"tensor {name!r} is {weight.entry.tag} with {scale.entry.tag} scales, which is not "
            "read here."
        )
    packed = outline("int8-token", weight.shape, dtype)
    return Found(
        packed, names, lambda w, s: put_together(packed, w.view(torch.uint8), s.float() * 64)
    )


def _int4(name: str, codes: tuple[int, ...], scales: tuple[int, ...], dtype: torch.dtype) -> Found:
    shape = (codes[0], codes[1] * 8)
    group = shape[1] // max(scales[-1], 1)
    fmt = "int4-token" if scales[-1] == 1 else f"int4-{group}-fp32"
    packed = outline(fmt, shape, dtype)

    def join(w: Tensor, s: Tensor, logical: Tensor) -> BlockTensor:
        if tuple(logical.tolist()) != shape:
            raise MicroscaleError(f"tensor {name!r} is padded, which is not read here.")
        return put_together(packed, w.contiguous().view(torch.uint8) ^ 0x88, s.float() * 4)

    return Found(packed, (f"{name}_packed", f"{name}_scale", f"{name}_shape"), join)


def _packed(
    name: str, codes: tuple[int, ...], scales: tuple[int, ...], dtype: torch.dtype, outer: bool
) -> Found:
    names = (f"{name}_packed", f"{name}_scale")
    if not outer:
        values = scales[-1] * 32
        fmt = "mxfp4" if codes[-1] * 2 == values else "mxfp6_e2m3"
        packed = outline(fmt, (*codes[:-1], values), dtype)
        return Found(packed, names, lambda w, s: put_together(packed, w, s))
    shape = (*codes[:-1], codes[-1] * 2)
    packed = outline("nvfp4", shape, dtype)

    def join(w: Tensor, s: Tensor, g: Tensor) -> BlockTensor:
        if torch.frexp(g.float())[0].abs().max().item() != 0.5:
            raise MicroscaleError(
                f"tensor {name!r} divides by {g.item()!r}; only powers of two have an exact "
                "reciprocal to multiply with."
            )
        return put_together(packed, w, s.view(torch.uint8), 1.0 / g)

    return Found(packed, (*names, f"{name}_global_scale"), join)
