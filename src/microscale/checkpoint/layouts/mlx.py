"""MLX: codes in uint32, the first lowest, and E8M0 `scales`, for linear layers and tables."""

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
    formats_of,
    is_weight,
    left_modules,
    model_dtype,
    not_along_last,
    outline,
    put_together,
    refuse_nan,
    usual_format,
)
from microscale.errors import MicroscaleError
from microscale.tensor import BlockTensor


class Mlx:
    """MLX: codes in uint32, the first lowest, and E8M0 scales, for linear layers and tables."""

    name = "mlx"
    modes: ClassVar = {"mxfp4": ("mxfp4", 4), "mxfp8_e4m3": ("mxfp8", 8)}

    def refusal(self, item: Item) -> str:
        """Why a packed tensor cannot be carried, or ""."""
        return is_weight(item) or not_along_last(item, *self.modes)

    def encode(self, name: str, q: BlockTensor) -> dict[str, Tensor]:
        """Weight and scales."""
        refuse_nan(name, q, self.name)
        scales = f"{name.removesuffix('.weight')}.scales"
        return {name: as_type(q.codes, torch.uint32), scales: q.scales}

    def find(self, parts: Parts, config: Mapping[str, Any]) -> Iterator[tuple[str, Found]]:
        """The packed weights."""
        for stored, scales in parts.items():
            module = stored.removesuffix(".scales")
            weight = parts.get(f"{module}.weight")
            if module == stored or weight is None or weight.entry.tag != "U32":
                continue
            if scales.entry.tag != "U8":
                raise MicroscaleError(
                    f"tensor {stored!r} is {scales.entry.tag}: MLX's affine mode is not read here."
                )
            bits = weight.shape[-1] * 32 // max(scales.shape[-1] * 32, 1)
            packed = outline(
                "mxfp4" if bits == 4 else "mxfp8_e4m3",
                (*scales.shape[:-1], scales.shape[-1] * 32),
                model_dtype(config),
            )
            yield f"{module}.weight", Found(packed, (f"{module}.weight", stored), _joiner(packed))

    def describe(self, content: Content, carried: Mapping[str, Item]) -> dict[str, dict[str, Any]]:
        """config.json's `quantization`, with modules that differ by name."""
        formats = formats_of(carried)
        tables = {
            name: {"group_size": 32, "bits": self.modes[fmt][1], "mode": self.modes[fmt][0]}
            for name, fmt in formats.items()
        }
        usual = next(tables[name] for name, fmt in formats.items() if fmt == usual_format(formats))
        others: dict[str, Any] = {name: t for name, t in tables.items() if t != usual}
        others |= dict.fromkeys(left_modules(content, carried), False)
        return {"config.json": {"quantization": usual | others}}


def _joiner(packed: Any) -> Any:
    return lambda w, s: put_together(packed, w.contiguous().view(torch.uint8), s)
