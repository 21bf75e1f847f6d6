"""AMD Quark: `weight` and E8M0 `weight_scale`; four codes of six bits in three bytes."""

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
    usual_format,
)
from microscale.errors import MicroscaleError
from microscale.tensor import BlockTensor


class Quark:
    """AMD Quark: E8M0 scales; four codes of six bits in three bytes."""

    name = "quark"
    dtypes: ClassVar = {
        "mxfp4": "fp4",
        "mxfp6_e2m3": "fp6_e2m3",
        "mxfp6_e3m2": "fp6_e3m2",
        "mxfp8_e4m3": "fp8_e4m3",
    }

    def refusal(self, item: Item) -> str:
        """Why a packed tensor cannot be carried, or ""."""
        return is_weight(item) or not_along_last(item, *self.dtypes)

    def encode(self, name: str, q: BlockTensor) -> dict[str, Tensor]:
        """Weight and scales."""
        wide = q.format.element.bits == 8
        codes = as_type(q.codes, torch.float8_e4m3fn) if wide else q.codes
        return {name: codes, f"{name}_scale": q.scales}

    def find(self, parts: Parts, config: Mapping[str, Any]) -> Iterator[tuple[str, Found]]:
        """The packed weights; their formats stand in the configuration."""
        table = config.get("quantization_config", {})
        usual = _quark_format(table.get("global_quant_config"))
        layers = table.get("layer_quant_config") or {}
        for name, fmt in _named(parts, layers, usual):
            yield name, byte_scaled(name, "_scale", fmt, parts, model_dtype(config))

    def describe(self, content: Content, carried: Mapping[str, Item]) -> dict[str, dict[str, Any]]:
        """config.json's quantization_config."""
        formats = formats_of(carried)
        usual = usual_format(formats)
        quantization = {
            "quant_method": self.name,
            "global_quant_config": _table(usual),
            "layer_quant_config": {
                name: _table(fmt) for name, fmt in formats.items() if fmt != usual
            },
            "exclude": left_modules(content, carried),
            "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real"},
        }
        return {"config.json": {"quantization_config": quantization}}


def _table(fmt: str) -> dict[str, Any]:
    weight = {
        "dtype": Quark.dtypes[fmt],
        "qscheme": "per_group",
        "group_size": 32,
        "ch_axis": -1,
        "scale_format": "e8m0",
        "is_dynamic": False,
    }
    return {"weight": weight, "input_tensors": None}


def _quark_format(table: object) -> str:
    weight = table.get("weight") if isinstance(table, dict) else None
    dtype = weight.get("dtype") if isinstance(weight, dict) else None
    names = {quark: fmt for fmt, quark in Quark.dtypes.items()}
    if dtype not in names:
        raise MicroscaleError(f"config.json: Quark's weights are {dtype!r}, not {list(names)}.")
    return names[dtype]


def _named(parts: Parts, layers: Mapping[str, Any], usual: str) -> Iterator[tuple[str, str]]:
    for stored in parts:
        name = stored.removesuffix("_scale")
        if stored.endswith(".weight_scale") and name in parts:
            own = layers.get(name.removesuffix(".weight"))
            yield name, usual if own is None else _quark_format(own)
