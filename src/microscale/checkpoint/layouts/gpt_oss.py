"""The `mxfp4` of transformers, as gpt-oss has it: the fused experts alone.

`NAME_blocks` [experts, out, in / 32, 16] and `NAME_scales` [experts, out, in / 32]; NAME stands in
the model as [experts, in, out].
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from microscale.checkpoint.layouts.base import (
    Content,
    Found,
    Item,
    Parts,
    base_name,
    model_dtype,
    outline,
    put_together,
)
from microscale.tensor import BlockTensor


class GptOss:
    """The layout."""

    name = "gpt-oss"

    def refusal(self, item: Item) -> str:
        """Why a packed tensor cannot be carried, or ""."""
        assert item.packed is not None
        names = (".experts.gate_up_proj", ".experts.down_proj")
        if len(item.shape) != 3 or item.packed.axis != 1 or not item.name.endswith(names):
            return "carries fused experts [experts, in, out] called gate_up_proj and down_proj"
        if base_name(item.packed) != "mxfp4" or item.shape[1] % 32:
            return f"carries mxfp4 in whole blocks of 32, not {item.packed.format}"
        return ""

    def encode(self, name: str, q: BlockTensor) -> dict[str, Tensor]:
        """Blocks and scales."""
        blocks = q.codes.reshape(*q.codes.shape[:-1], -1, 16)
        return {f"{name}_blocks": blocks, f"{name}_scales": q.scales}

    def find(self, parts: Parts, config: Mapping[str, Any]) -> Iterator[tuple[str, Found]]:
        """The packed experts."""
        dtype = model_dtype(config)
        for stored, blocks in parts.items():
            name = stored.removesuffix("_blocks")
            if name == stored or f"{name}_scales" not in parts or len(blocks.shape) != 4:
                continue
            experts, out, count, _ = blocks.shape
            packed = outline("mxfp4", (experts, count * 32, out), dtype, axis=1)
            names = (stored, f"{name}_scales")
            yield name, Found(packed, names, lambda w, s, packed=packed: put_together(packed, w, s))

    def describe(self, content: Content, carried: Mapping[str, Item]) -> dict[str, dict[str, Any]]:
        """config.json's quantization_config."""
        kept = {name.rpartition(".")[0] for name in content.items if name not in carried}
        quantization = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": sorted(name for name in kept if "experts" not in name),
        }
        return {"config.json": {"quantization_config": quantization}}
