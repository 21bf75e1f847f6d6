"""NVIDIA ModelOpt: `weight`, `weight_scale` and, for NVFP4, a second scale that is multiplied."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from microscale.checkpoint.layouts.base import (
    Content,
    Found,
    Item,
    Parts,
    as_type,
    byte_scaled,
    formats_of,
    is_weight,
    left_modules,
    model_dtype,
    not_along_last,
)
from microscale.tensor import BlockTensor


class ModelOpt:
    """NVIDIA ModelOpt: NVFP4 with a second scale that is multiplied, and MXFP8."""

    name = "modelopt"
    algorithms: ClassVar = {"nvfp4": "NVFP4", "mxfp8_e4m3": "MXFP8"}

    def refusal(self, item: Item) -> str:
        """Why a packed tensor cannot be carried, or ""."""
        return is_weight(item) or not_along_last(item, *self.algorithms)

    def encode(self, name: str, q: BlockTensor) -> dict[str, Tensor]:
        """Weight and scales."""
        if q.format.element.bits == 8:
            return {name: as_type(q.codes, torch.float8_e4m3fn), f"{name}_scale": q.scales}
        scale = as_type(q.scales, torch.float8_e4m3fn)
        return {
            name: q.codes,
            f"{name}_scale": scale,
            f"{name}_scale_2": q.tensor_scale.reshape(()),
        }

    def find(self, parts: Parts, config: Mapping[str, Any]) -> Iterator[tuple[str, Found]]:
        """The packed weights, known by their second scale."""
        for stored in parts:
            name = stored.removesuffix("_scale")
            if not stored.endswith(".weight_scale") or name not in parts:
                continue
            second = f"{name}_scale_2"
            fmt = "nvfp4" if second in parts else "mxfp8_e4m3"
            found = byte_scaled(name, "_scale", fmt, parts, model_dtype(config))
            names = (*found.names, second) if second in parts else found.names
            yield name, Found(found.packed, names, found.join)

    def describe(self, content: Content, carried: Mapping[str, Item]) -> dict[str, dict[str, Any]]:
        """hf_quant_config.json, and the same in config.json."""
        formats = formats_of(carried)
        kinds = {self.algorithms[fmt] for fmt in formats.values()}
        quantization: dict[str, Any] = {
            "quant_algo": kinds.pop() if len(kinds) == 1 else "MIXED_PRECISION",
            "kv_cache_quant_algo": None,
            "exclude_modules": left_modules(content, carried),
        }
        if quantization["quant_algo"] == "MIXED_PRECISION":
            quantization["quantized_layers"] = {
                name: {
                    "quant_algo": self.algorithms[fmt],
                    "group_size": 16 if fmt == "nvfp4" else 32,
                }
                for name, fmt in formats.items()
            }
        else:
            quantization["group_size"] = 16 if quantization["quant_algo"] == "NVFP4" else 32
        producer = {"name": "microscale"}
        own = {"quant_method": self.name, **quantization, "producer": producer}
        return {
            "hf_quant_config.json": {"producer": producer, "quantization": quantization},
            "config.json": {"quantization_config": own},
        }
